"""The sides of a loop benchmark, each run in a process of its own, in turn, and what they report.

    def fastrlhf(options, folder): ...            # imports what it needs: a peer's process has nothing of ours
    if __name__ == "__main__":
        run(fastrlhf, trl)                        # in a side's process, that side; else `main`

A side prints one line of JSON: the wall seconds of the training itself (not of imports, loading and tokenising), the
real tokens it trained on, the losses of its steps, its peak memory, and what else it knows.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.loops import task

ROOT = Path(__file__).parents[2]
BF16_RTOL = 0.05  # of losses on a GPU, where the forward is in bfloat16
Side = Callable[[argparse.Namespace, Path], dict[str, Any]]
OPTIONS: dict[str, dict[str, Any]] = {
    "--shape": {"choices": tuple(task.SHAPES), "default": "10m", "help": "of the model, with random weights"},
    "--data": {"help": "pairs of HH-RLHF text (JSON lines, .gz or not); default: random texts of such lengths"},
    "--repeats": {"type": int, "default": 3, "help": "runs of each side"},
    "--batch": {"type": int, "default": 8, "help": "sequences a step (reward: half as many pairs)"},
    "--pairs": {"type": int, "default": 32, "help": "preference pairs, two sequences each"},
    "--trl": {
        "default": os.environ.get("TRL_PYTHON", sys.executable),
        "help": "Python with TRL 1.16; default: TRL_PYTHON in the environment, or this one",
        "metavar": "PYTHON",
    },
}


def has(python: str, module: str) -> bool:
    """Whether a Python can import a module."""
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def begin(name: str, more: dict[str, dict[str, Any]]) -> Any:
    """The harness's Report of the benchmark in bench_<name>.py. With --tiny the task is a small one."""
    from benchmarks.harness import Report

    report = Report(name, more=more)
    report.options.benchmark = name
    if report.options.tiny:
        report.options.shape, report.options.repeats = "tiny", 1
        report.options.pairs, report.options.batch = 4, 4
    return report


@contextmanager
def made(options: argparse.Namespace, *kinds: str) -> Iterator[Path]:
    """A folder with the task and models of the given kinds, deleted at the end."""
    with tempfile.TemporaryDirectory() as folder:
        task.make(Path(folder), options.shape, options.pairs, options.data, kinds)
        _free_gpu()
        yield Path(folder)


def _free_gpu() -> None:
    """Leaves the memory of a GPU, which torch would keep for this process, to those of the sides."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pythons(python: str, module: str = "trl", instead: str | None = None) -> dict[str, str]:
    """The Python of each side: ours, and TRL's where it is there.

    python: the one to run TRL with; module: that it must have; instead: the side that takes its place"""
    found = {"fastrlhf": sys.executable}
    if has(python, module):
        found["trl"] = python
    else:
        print(f"TRL is left out: {python} has no {module}", flush=True)
        if instead:
            found[instead] = sys.executable
    return found


def alternate(sides: dict[str, str], options: argparse.Namespace, folder: Path, **more: Any) -> dict[str, list[dict]]:
    """What each side printed in each of its runs; they run in turn.

    sides: the Python of each side by name; more: options of the sides' processes"""
    results: dict[str, list[dict]] = {name: [] for name in sides}
    for repeat in range(options.repeats):
        for name, python in sides.items():
            results[name].append(once(name, python, options, folder, **more))
            figures = ", ".join(f"{k} {v:.4g}" for k, v in results[name][-1].items() if isinstance(v, float | int))
            print(f"  {repeat + 1} {name}: {figures}", flush=True)
    return results


def once(name: str, python: str, options: argparse.Namespace, folder: Path, **more: Any) -> dict[str, Any]:
    """Runs a side of the benchmark that is running; returns what it printed."""
    settings = json.dumps({**vars(options), **more}, default=str)
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore"}
    call = [python, "-m", f"benchmarks.loops.bench_{options.benchmark}", "--side", name, settings, str(folder)]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(main: Callable[[], None], sides: dict[str, Side]) -> None:
    """The main of a benchmark's file: in a side's process that side, else `main`."""
    if sys.argv[1:2] != ["--side"]:
        main()
        return
    _, _, name, settings, folder = sys.argv
    result = sides[name](argparse.Namespace(**json.loads(settings)), Path(folder))
    print(json.dumps({**result, "peak_mib": peak_mib()}), flush=True)


def peak_mib() -> float:
    """Most memory of this process in MiB: that of its tensors on a GPU, its resident set elsewhere."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def expect_equal_losses(results: dict[str, list[dict]], rtol: float, device: str) -> dict[str, float]:
    """Returns the largest relative difference of each side's losses, step by step, to those of the first side.

    On a GPU that is the difference of the first step's, as training enlarges what bfloat16 rounds.
    Raises: AssertionError above rtol, on a GPU BF16_RTOL."""
    if device != "cpu":
        rtol = BF16_RTOL
        results = {name: [{"losses": run["losses"][:1]} for run in runs] for name, runs in results.items()}
    first, errors = next(iter(results.values()))[0]["losses"], {}
    for name, runs in results.items():
        pairs = [pair for run in runs for pair in zip(first, run["losses"], strict=True)]
        errors[name] = max(abs(ours - theirs) / abs(ours) for ours, theirs in pairs)
        assert errors[name] <= rtol, f"{name}: losses differ by {errors[name]:.1e}: {runs[0]['losses']}, ours {first}"
    return errors


def forward_operations(config: Any, lengths: list[int], num_logits: int) -> float:
    """Floating-point operations of a forward pass over sequences without padding, with logits for so many tokens."""
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    kv = head * (config.num_key_value_heads or config.num_attention_heads)
    of_token = 2 * (2 * width * width + 2 * width * kv + 3 * width * config.intermediate_size)
    attention = 2 * width * sum(n * n for n in lengths)  # causal: half of 4 n^2 D
    return config.num_hidden_layers * (of_token * sum(lengths) + attention) + 2 * width * config.vocab_size * num_logits


def add(report: Any, case: str, runs: dict[str, list[dict]], operations: float, **figures: dict[str, float]) -> None:
    """Adds a case: its real tokens a second, the share of the machine's matrix product rate, and peak memory."""
    medians = {name: statistics.median(run["seconds"] for run in of_side) for name, of_side in runs.items()}
    first = next(iter(runs))
    operations *= runs[first][0].get("share", 1.0)
    rate = report.machine["matrix_gflop_s" if report.options.device == "cpu" else "matrix_bf16_gflop_s"] * 1e9
    report.add(
        case,
        {name: timing(of_side) for name, of_side in runs.items()},
        tokens_per_s={name: runs[first][0]["tokens"] / seconds for name, seconds in medians.items()},
        matrix_share={name: operations / seconds / rate for name, seconds in medians.items()},
        process_peak_mib={name: max(run["peak_mib"] for run in of_side) for name, of_side in runs.items()},
        **figures,
    )


def timing(runs: list[dict[str, Any]]) -> Any:
    """The harness's Timing of the runs of a side."""
    from benchmarks.harness import Timing

    ms = [run["seconds"] * 1e3 for run in runs]
    fifths = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else ms * 2
    return Timing(statistics.median(ms), fifths[0], fifths[-1], len(ms))
