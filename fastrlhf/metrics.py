"""What a run tells: metrics.jsonl, timing.jsonl, TensorBoard, a line a step on the terminal, a progress bar."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

SHORT = {  # what a line on the terminal shows, in this order, if the loop has it
    "loss": "loss",
    "accuracy": "acc",
    "eval/loss": "eval loss",
    "eval/accuracy": "eval acc",
    "objective/scores": "score",
    "objective/kl": "kl",
    "objective/entropy": "entropy",
    "ppo/policy/clip_fraction": "clip",
    "ppo/value/explained_variance": "expl var",
    "response/length": "length",
    "response/eos_rate": "eos",
    "grad_norm": "grad",
    "learning_rate": "lr",
}


class MetricsLog:
    """Writes a run's metrics. On resume it first cuts both files back to the checkpoint's step."""

    def __init__(self, output: str | Path, *, num_steps: int, step: int = 0, tensorboard: bool = False) -> None:
        self.output = Path(output)
        self.num_steps = num_steps
        for name in ("metrics.jsonl", "timing.jsonl"):
            cut_back(self.output / name, step)
        self.writer = tensorboard_writer(self.output) if tensorboard else None
        self.console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self.timer = Timer()

    def add(self, step: int, metrics: dict[str, float], *, num_tokens: int) -> None:
        """Writes the metrics of a step, and its times since the last one.

        metrics: values that do not depend on the clock; num_tokens: tokens processed, for tokens/s"""
        timing = self.timer.lap()
        timing["tokens_per_second"] = num_tokens / timing["seconds"]
        append(self.output / "metrics.jsonl", {"step": step, **metrics})
        append(self.output / "timing.jsonl", {"step": step, **timing, "peak_memory_gib": peak_memory_gib()})
        if self.writer is not None:
            for name, value in {**metrics, **{f"time/{k}": v for k, v in timing.items()}}.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()
        shown = [f"{short} {metrics[name]:.4g}" for name, short in SHORT.items() if name in metrics]
        head = f"step {step:>{len(str(self.num_steps))}}/{self.num_steps}"
        self.console.print("  ".join([head, *shown, f"{timing['tokens_per_second']:.0f} tok/s"]))

    def say(self, text: str) -> None:
        """Prints a line to the terminal."""
        self.console.print(text)

    @contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Any]:
        """A bar that lives during a phase: yields advance(n), n in tokens. Silent when not on a terminal."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        start, done = time.perf_counter(), 0
        bar = Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)
        bar.disable = not self.console.is_terminal
        with bar:
            task: TaskID = bar.add_task(what, total=total, rate="")

            def advance(n: int) -> None:
                nonlocal done
                done += n
                bar.update(task, advance=n, rate=f"{done / (time.perf_counter() - start):.0f} tok/s")

            yield advance


class Timer:
    """Seconds of named phases and of the whole since the last lap."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        now = time.perf_counter()
        times = {"seconds": now - self.start, **{f"{name}_seconds": s for name, s in self.phases.items()}}
        self.start, self.phases = now, {}
        return times


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a line of JSON; a number that is not finite becomes null, which every reader takes."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(clean) + "\n")


def cut_back(path: Path, step: int) -> None:
    """Removes lines after `step` (and a half-written last line), leaving the earlier ones byte for byte."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(kept))
    os.replace(partial, path)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def peak_memory_gib() -> float:
    """Peak memory of the process, or of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def tensorboard_writer(folder: Path) -> Any:
    """A TensorBoard writer; raises ModuleNotFoundError naming the extra where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModuleNotFoundError("tensorboard is not installed: pip install 'fastrlhf[tensorboard]'") from None
    return SummaryWriter(folder / "tensorboard")
