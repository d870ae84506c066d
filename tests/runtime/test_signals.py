"""SIGINT and SIGTERM during a command: a whole step, a checkpoint, a line on how to go on; the second one ends it."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from loops import ROOT, demonstrations, model_folder, write_rows

from fastrlhf.cli.main import main
from fastrlhf.runtime import distributed, signals
from fastrlhf.runtime.checkpoint import newest_checkpoint

NAMES = ("metrics.jsonl", "model/model.safetensors")


def start(arguments, path=ROOT, **options):
    """The command in another process, and what it prints up to its first step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{path}"}
    command = [sys.executable, "-u", "-m", "fastrlhf", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes, **options)
    for line in process.stdout:
        if re.match(r" *1/\d* ", line):
            return process
    raise AssertionError(process.communicate()[1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The options of a run, and the folder of one that ran to its end."""
    folder = tmp_path_factory.mktemp("signals")
    data = demonstrations(folder / "data.jsonl")
    arguments = ["sft", f"--model={model_folder(folder / 'm')}", f"--data={data}", "--batch-size=4", "--epochs=20"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main([*arguments, f"--output={folder / 'whole'}"]) == 0
    torch.set_num_threads(threads)
    return arguments, folder / "whole"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint_and_resumes_bit_for_bit(undisturbed, tmp_path, capsys, number):
    arguments, whole = undisturbed
    arguments = [*arguments, f"--output={tmp_path / 'out'}"]
    process = start(arguments)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 128 + number, error
    newest = newest_checkpoint(tmp_path / "out")
    *_, first, second, last = error.splitlines()
    assert (first, second) == (
        signals.MESSAGE.strip(),
        f"fastrlhf sft: interrupted; the newest checkpoint is {newest}",
    )
    program, command = last.removeprefix("go on with: ").split(" -m fastrlhf ")
    assert program == f"{sys.executable} -u" and main(shlex.split(command)) == 0
    assert f"resuming from {newest}" in capsys.readouterr().out
    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes(), name


INTERRUPTED = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""


@pytest.mark.parametrize("program", [["-m", "fastrlhf"], ["-mfastrlhf"], ["fastrlhf"], ["-c", "import fastrlhf", "-m"]])
def test_ctrl_c_while_the_command_imports_ends_it_without_a_traceback(tmp_path, program):
    """And leaves other programs that import the package as they are. The torch here sends it."""
    (tmp_path / "torch.py").write_text(INTERRUPTED)
    (tmp_path / "fastrlhf").write_text("from fastrlhf.cli.main import main")  # as pip makes one
    command = [sys.executable, *program, "sft", "--model", "m"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    if program[0] != "-c":
        assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "fastrlhf: interrupted\n")
    else:
        assert done.returncode == -signal.SIGINT and done.stderr.endswith("KeyboardInterrupt\n")


REWARD = """
import multiprocessing
import time

POOL = multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1)


def reward(prompts, responses, **_):
    waiting = POOL.map_async(time.sleep, [0.7, 0.8])  # the second one in a worker of its own
    time.sleep(0.5)
    print("1/ all have begun", flush=True)
    waiting.get()
    return [float(len(response)) for response in responses]
"""


def test_ctrl_c_leaves_the_pool_of_a_reward_function_to_finish_the_step(tmp_path):
    """The terminal sends it to all of them."""
    (tmp_path / "rewards_in_processes.py").write_text(REWARD)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(8)])
    arguments = ["ppo", f"--model={model_folder(tmp_path / 'm')}", f"--data={prompts}", "--batch-size=4", "--steps=9"]
    arguments += ["--reward=rewards_in_processes:reward", "--max-new-tokens=4", f"--output={tmp_path / 'out'}"]
    process = start([*arguments, "--device=cpu", "--minibatches=1"], path=tmp_path, start_new_session=True)
    try:
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGINT, error
        assert error.splitlines()[-2].endswith(f"newest checkpoint is {tmp_path / 'out/checkpoints/step-000001'}")
        with pytest.raises(ProcessLookupError):  # none is left
            for _ in range(100):
                os.killpg(process.pid, 0)
                time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def loop():
    loop = Loop()
    signals.defer_signals_for(loop)
    yield loop
    signals.no_longer_defer_for(loop)


class Loop:
    """Stands for one that runs."""


def test_a_signal_waits_for_the_step_and_a_second_one_does_not(loop, capfd):
    before = signal.getsignal(signal.SIGTERM)
    with signals.handled():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.pending() == signal.SIGTERM and capfd.readouterr().err == signals.MESSAGE
        with pytest.raises(signals.Interrupted) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
        assert stopped.value.number == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a third one ends the process, whatever hangs
    assert signal.getsignal(signal.SIGTERM) == before and not signals.pending()


def test_a_signal_during_the_wait_for_a_server_stops_at_once_unless_an_update_has_begun(loop):
    """The rest of the wait may be as long as the server's timeout."""
    loop.is_in_step = False
    with signals.handled(), signals.waiting_for_a_server(), pytest.raises(signals.Interrupted):
        os.kill(os.getpid(), signal.SIGINT)
    loop.is_in_step = True
    with signals.handled():
        with signals.waiting_for_a_server():
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.pending() == signal.SIGINT
        loop.is_in_step = False  # the next step
        with pytest.raises(signals.Interrupted), signals.waiting_for_a_server():
            raise AssertionError("the wait begins")


def test_a_signal_that_torchrun_repeats_is_one(loop, monkeypatch):
    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (0, 2))
    with signals.handled():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.pending() == signal.SIGINT


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_of_a_run_ends_as_ever(loop):
    """As the workers of a pool that a reward function keeps."""
    with signals.handled():
        ends = os.pipe()
        child = os.fork()
        if not child:
            os.write(ends[1], b"!")
            for _ in range(3000):
                time.sleep(0.01)
            os._exit(0)
        os.read(ends[0], 1)  # Python forgets what comes while it forks
        os.kill(child, signal.SIGINT)  # which it ignores
        time.sleep(0.05)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_signal_stops_at_once_where_no_loop_runs():
    with signals.handled(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_during_the_last_step_of_a_loop_stops_the_job_before_its_next_stage(loop):
    with signals.handled():
        os.kill(os.getpid(), signal.SIGTERM)
        signals.no_longer_defer_for(loop)
        with pytest.raises(signals.Interrupted):
            signals.stop_if_asked()


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.handled():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
