"""The time limit of reward functions: wherever they hang, the run ends with a line that says where."""

import asyncio
import contextlib
import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from loops import model_folder, write_rows

from fastrlhf.cli.main import main
from fastrlhf.rewards import time_limit
from fastrlhf.rewards.time_limit import within_reward_timeout


def sleeps():
    time.sleep(60)


def computes():
    while True:
        pass


def waits_for_a_socket():
    one, _other = socket.socketpair()
    with one, _other:
        one.recv(1)


def waits_for_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def waits_for_a_program():
    subprocess.run(["sleep", "60"], check=True)


def waits_in_asyncio():
    asyncio.run(asyncio.sleep(60))


def tries_again_after_every_error():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


def answers_all_the_same():
    try:
        time.sleep(60)
    except BaseException:
        return [0.0]


def fails_of_it():
    try:
        time.sleep(60)
    except BaseException as error:
        raise KeyError("no answer") from error


HANGING = (
    sleeps,
    computes,
    waits_for_a_socket,
    waits_for_a_lock,
    waits_for_a_program,
    waits_in_asyncio,
    tries_again_after_every_error,
    answers_all_the_same,
    fails_of_it,
)


@pytest.fixture
def signals_stay():
    numbers = (signal.SIGURG, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    for thread in threading.enumerate():
        if thread.name == "reward_timeout":
            thread.join(5)
            assert not thread.is_alive()


@pytest.mark.usefixtures("signals_stay")
@pytest.mark.parametrize("function", HANGING)
def test_a_function_that_hangs_is_ended_and_its_line_is_named(function):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"reward_timeout=0\.2") as raised:
        within_reward_timeout(0.2, "rules:score", 7, partial(function))
    assert 0.2 <= time.monotonic() - start < 5
    text = str(raised.value)
    assert text.startswith("reward: rules:score on 7 responses had not returned after 0.2 s; it was at ")
    line = int(re.search(rf"test_reward_timeout.py:(\d+) in {function.__name__}: ", text)[1])
    lines, first = inspect.getsourcelines(function)
    assert first < line < first + len(lines)
    assert "\n" not in text


@pytest.mark.usefixtures("signals_stay")
def test_a_function_in_time_keeps_its_value_its_errors_and_its_thread():
    def told():
        return threading.current_thread(), asyncio.run(asyncio.sleep(0, "value"))

    assert within_reward_timeout(60, "f", 1, told) == (threading.main_thread(), "value")
    with pytest.raises(ZeroDivisionError) as raised:
        within_reward_timeout(60, "f", 1, lambda: 1 / 0)
    assert raised.traceback[-1].name == "<lambda>" and raised.value.__context__ is None
    with pytest.raises(KeyboardInterrupt):
        within_reward_timeout(60, "f", 1, lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(1))


@pytest.mark.usefixtures("signals_stay")
def test_without_a_limit_there_is_no_clock():
    assert within_reward_timeout(None, "f", 1, threading.enumerate) == threading.enumerate()


def test_a_slow_function_is_told_of_once(monkeypatch, capfd):
    monkeypatch.setattr(time_limit, "NOTE", 0.1)
    for _ in range(2):
        within_reward_timeout(60, "rules:slow", 3, partial(time.sleep, 0.2))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("note: rules:slow on 3 responses takes more than 0.1 s, now at ")
    assert line.endswith("reward_timeout=60")


SCRIPT = """
import concurrent.futures, ctypes, importlib.util, re, signal, sys, threading, time
spec = importlib.util.spec_from_file_location("time_limit", sys.argv[2])  # without torch, which takes seconds
time_limit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(time_limit)
time_limit.GRACE = 0.3

def regular_expression():  # keeps the lock, and looks for signals
    re.match("(a+)+$", "a" * 60 + "b")

def with_alarms_of_its_own():
    signal.signal(signal.SIGALRM, lambda *_: called.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(60)

def catches_everything():
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass

def in_another_thread():
    thread = threading.Thread(target=lambda: time_limit.within_reward_timeout(0.2, "f", 4, sleeps))
    thread.start()
    thread.join()

def sleeps():
    time.sleep(60)

def in_c_with_the_lock():
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)

def leaves_a_worker():
    concurrent.futures.ThreadPoolExecutor(1).submit(time.sleep, 60).result()

called = []
function = globals()[sys.argv[1]]
if function is in_another_thread:
    function()
try:
    time_limit.within_reward_timeout(0.2, "f", 4, function)
except TimeoutError as error:
    print(error, called, flush=True)
    time_limit.leave_if_interrupted(4)
    sys.exit(3)
"""


@pytest.mark.parametrize(
    ("function", "status", "words"),
    [
        ("regular_expression", 3, 're.match("(a+)+$", "a" * 60 + "b")'),
        (
            "with_alarms_of_its_own",
            3,
            "time.sleep(60). Mend the function, or raise reward_timeout=0.2 (none: no limit) [1]",
        ),
        ("catches_everything", 1, "in catches_everything: time.sleep(60). Mend the function"),
        ("in_another_thread", 1, "in sleeps: time.sleep(60). Mend the function"),
        ("leaves_a_worker", 4, "in leaves_a_worker: concurrent.futures"),
        ("in_c_with_the_lock", 1, "in within_reward_timeout"),
    ],
)
def test_what_no_signal_of_ours_ends_is_ended_by_another_clock_or_with_the_process(tmp_path, function, status, words):
    script = tmp_path / "hangs.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), function, time_limit.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == status
    assert words in done.stdout + done.stderr and "hangs.py" in done.stdout + done.stderr
    if status == 1 and function != "in_c_with_the_lock":
        assert "It could not be interrupted, so the process ends" in done.stderr


RULES = """
import threading, time
from pathlib import Path
calls = []

def score(prompts, responses, *, response_ids):
    calls.append(1)
    if Path({flag!r}).exists() and len(calls) == 2:
        while True:
            time.sleep(0.01)
    return [float(len(ids)) for ids in response_ids]
"""


@pytest.mark.usefixtures("one_thread")
def test_a_run_whose_reward_hangs_ends_with_a_line_and_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    (tmp_path / "hanging_rules.py").write_text(RULES.format(flag=str(tmp_path / "hang")))
    monkeypatch.syspath_prepend(tmp_path)
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": f"p{n}"} for n in range(8)])
    arguments = ["ppo", f"--model={model_folder(tmp_path / 'm')}", f"--data={data}", "--reward=hanging_rules:score"]
    arguments += ["--steps=3", "--batch-size=4", "--max-new-tokens=4", "--save-every=1", "--value-warmup-steps=0"]
    outputs = [tmp_path / "whole", tmp_path / "hung"]
    assert main([*arguments, f"--output={outputs[0]}"]) == 0
    import hanging_rules

    hanging_rules.calls.clear()
    (tmp_path / "hang").touch()
    capsys.readouterr()
    assert main([*arguments, f"--output={outputs[1]}", "--reward-timeout=0.5"]) == 1
    lines = capsys.readouterr().err.splitlines()
    line = next(n for n, line in enumerate(lines) if "error" in line)
    assert lines[line].startswith(
        "fastrlhf ppo: error: reward: score on 4 responses had not returned after 0.5 s; it was at "
    )
    assert "hanging_rules.py:10 in score: time.sleep(0.01)" in lines[line]
    assert f"{outputs[1]}/checkpoints/step-000001" in lines[line + 1] and "--resume" in lines[-1]
    (tmp_path / "hang").unlink()
    assert main([*arguments, f"--output={outputs[1]}", "--resume", "--reward-timeout=60"]) == 0
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()
    assert len((outputs[0] / "metrics.jsonl").read_text().splitlines()) == 3
