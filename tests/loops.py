"""A tiny model folder, tiny data, and a run that is killed: what the tests of every loop need."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import torch
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
DIES = """
import os, signal
from {module} import {loop}
from fastrlhf import {loop_config}
for n, _ in enumerate({loop}({loop_config}(**{settings!r})), 1):
    if n == {num_steps}:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def model_folder(path, *, chat=True, pad_is_eos=False, **changes):
    """Writes a tiny random model with its tokenizer; returns the folder as text."""
    tiny_model(**changes).save_pretrained(path)
    tiny_tokenizer(chat=chat, pad_is_eos=pad_is_eos).save_pretrained(path)
    return str(path)


def write_rows(path, rows):
    """Writes a JSONL file; returns its path as text."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def word(rng, letters, length):
    return "".join(rng.choice(letters) for _ in range(length))


def demonstrations(path, num=24, seed=0):
    """Prompts of random letters, each completed by its last letter four times."""
    rng = random.Random(seed)
    prompts = [word(rng, "abcd", rng.randint(3, 12)) for _ in range(num)]
    return write_rows(path, [{"prompt": p, "completion": p[-1] * 4} for p in prompts])


def pairs(path, num=48, seed=0):
    """The better response has the letter x more often than the worse one."""
    rng = random.Random(seed)
    return write_rows(
        path,
        [
            {
                "prompt": word(rng, "abcd", rng.randint(2, 6)),
                "chosen": word(rng, "xxxab", rng.randint(4, 9)),
                "rejected": word(rng, "yyyab", rng.randint(4, 9)),
            }
            for _ in range(num)
        ],
    )


def run_until_killed(loop, loop_config, settings, num_steps):
    """Runs a loop in another process, which gets SIGKILL after num_steps steps."""
    script = DIES.format(
        module=loop.__module__,
        loop=loop.__name__,
        loop_config=loop_config.__name__,
        settings=settings,
        num_steps=num_steps,
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def assert_resumes_bit_for_bit(loop, loop_config, settings, folder, *, killed_after):
    """Fails unless a run that is killed and resumed writes the bytes that an uninterrupted run writes."""
    whole = {**settings, "output": str(folder / "whole")}
    for _ in loop(loop_config(**whole)):
        pass
    killed = {**settings, "output": str(folder / "killed")}
    run_until_killed(loop, loop_config, killed, killed_after)
    metrics = [Path(run["output"]) / "metrics.jsonl" for run in (whole, killed)]
    steps = [json.loads(line)["step"] for line in metrics[1].read_text().splitlines()]
    assert [step for step in steps if step] == list(range(1, killed_after + 1))  # 0: held-out prompts at the start
    resumed = loop(loop_config(**killed, resume=True))
    assert 0 < resumed.num_steps_done < killed_after, "the kill must come between two checkpoints"
    for _ in resumed:
        pass
    assert metrics[0].read_bytes() == metrics[1].read_bytes()
    for file in (path for path in (folder / "whole" / "model").rglob("*") if path.is_file()):
        name = file.relative_to(folder / "whole")
        assert file.read_bytes() == (folder / "killed" / name).read_bytes(), name
