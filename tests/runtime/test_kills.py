"""`fastrlhf ppo` on SmolLM2-135M, killed at five random moments and resumed each time, writes what an undisturbed run
writes, bit for bit. Ten minutes for each case, and 12 GB of disk, so only where SMOLLM2 names the model's folder.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loops import ROOT, write_rows

from fastrlhf.data.template import load_tokenizer
from fastrlhf.models.policy import RewardModel

MODEL = Path(os.environ.get("SMOLLM2", "SMOLLM2 is not set"))
STEPS, KILLS = 7, 5
REWARDS = {"model": "{folder}/reward", "function": "ppo_runs:share_of_low_tokens"}
ROLES = {"separate": [], "adapters": ["--lora-rank=8"]}  # how the models of a run share weights
SIZES = ["--batch-size=4", "--minibatches=2", "--epochs=1", "--max-new-tokens=6", "--limit=16"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not MODEL.is_dir(), reason=f"SMOLLM2 names the folder of the model: {MODEL}"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    RewardModel.from_pretrained(MODEL, new_head=True).save_pretrained(folder / "reward")
    load_tokenizer(str(MODEL)).save_pretrained(folder / "reward")
    write_rows(folder / "prompts.jsonl", [{"prompt": f"What is {n} plus {n}?"} for n in range(16)])
    write_rows(folder / "held_out.jsonl", [{"prompt": f"What is {n} minus {n}?"} for n in range(4)])
    return folder


def start(folder, output, options):
    """A process of the run, and the file that its table of steps goes to."""
    command = [sys.executable, "-u", "-m", "fastrlhf", "ppo", f"--model={MODEL}", f"--output={output}", *options]
    data = [f"--data={folder / 'prompts.jsonl'}", f"--eval-data={folder / 'held_out.jsonl'}", "--eval-every=3"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    log = output.with_suffix(".log")
    with open(log, "wb") as file:
        command += [*SIZES, f"--steps={STEPS}", *data]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment), log


def num_steps(log):
    """How many steps the process has done."""
    return len(re.findall(rf"^ *\d+/{STEPS} ", log.read_text(), re.MULTILINE))


def run_undisturbed(folder, output, options):
    """Returns the seconds until the first step was done, and those of a later one. Without checkpoints."""
    begun, times = time.monotonic(), []
    process, log = start(folder, output, [*options, "--save-every=0"])
    while process.poll() is None:
        while len(times) < num_steps(log):
            times.append(time.monotonic() - begun)
        time.sleep(0.05)
    assert process.returncode == 0, log.read_text()[-3000:]
    return times[0], (times[-1] - times[0]) / (STEPS - 1)


def kill_after(folder, output, options, *, steps, seconds):
    """Starts or resumes the run and sends SIGKILL so many seconds after so many steps. Returns what it was doing."""
    process, log = start(folder, output, [*options, "--save-every=1", "--resume"])
    while process.poll() is None and num_steps(log) < steps:
        time.sleep(0.05)
    time.sleep(seconds)
    assert process.poll() is None, f"the run ended before the kill:\n{log.read_text()[-3000:]}"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = ", ".join(sorted(path.name for path in output.glob("checkpoints/*")))
    return f"{seconds:.1f} s after {steps} steps of its own, leaving {left or 'no checkpoint'}"


@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("reward", REWARDS)
def test_a_run_killed_at_five_random_moments_is_that_of_an_undisturbed_run(folder, reward, roles):
    options = [f"--reward={REWARDS[reward].format(folder=folder)}", *ROLES[roles]]
    whole, killed = (folder / f"{reward}-{roles}-{name}" for name in ("whole", "killed"))
    first, later = run_undisturbed(folder, whole, options)
    seed = time.time_ns()
    print(f"seed {seed}: the first step took {first:.1f} s with the start, a later one {later:.1f} s", flush=True)
    rng = random.Random(seed)
    for number in range(KILLS):
        # while it starts or does its first step; or, where enough is left to do, during what comes after that
        nearly_done = (killed / f"checkpoints/step-{STEPS - 2:06d}").exists()
        steps = 0 if number == 0 or nearly_done else rng.randint(0, 1)
        seconds = rng.uniform(0, 2 * later if steps else first)
        print(f"killed {kill_after(folder, killed, options, steps=steps, seconds=seconds)}", flush=True)
    process, log = start(folder, killed, [*options, "--save-every=3", "--resume"])
    assert process.wait() == 0, log.read_text()[-3000:]
    print(f"the last process did {num_steps(log)} of {STEPS} steps", flush=True)
    for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors", "best/model.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
