"""What a run tells: metrics.jsonl, timing.jsonl, TensorBoard, a growing table on the terminal, a progress bar."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from fastrlhf.errors import MissingPackageError
from fastrlhf.runtime import distributed
from fastrlhf.runtime.checkpoint import LOG_FILES
from fastrlhf.runtime.jsonl import append, truncate_after_step

COLUMNS = {  # of the table on the terminal, most important first; a loop shows those that it has
    "loss": "loss",
    "accuracy": "accuracy",
    "margin": "margin",
    "objective/scores": "score",
    "objective/kl": "kl",
    "objective/entropy": "entropy",
    "response/length": "length",
    "response/eos_rate": "eos",
    "ppo/policy/clip_fraction": "clipped",
    "ppo/value/explained_variance": "expl.var",
    "ppo/policy/grad_norm": "grad",
    "grad_norm": "grad",
    "learning_rate": "lr",
    "ppo/policy/learning_rate": "lr",
}
WIDTH = 9  # of a column, and two spaces
PIPE_WIDTH = 110  # of the table where there is no terminal
ROWS_A_HEADER = 30
ROWS_A_TIMING = 10  # rows of the table between two lines on where the time goes
COUNTS = {"num_pairs": "pairs", "num_labels": "labels", "num_ratings": "ratings", "ties": "ties"}  # of held-out rows
Extreme = Literal["max", "min"]
# how statistics of two micro-batches become one, and those of several minibatches; None: of sums
JOINS: dict[Extreme | None, Callable[[Tensor, Tensor], Tensor]] = {
    None: torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}
MEANS: dict[Extreme | None, Callable[[Tensor], Tensor]] = {None: torch.mean, "max": torch.amax, "min": torch.amin}


class MetricsLog:
    """Writes a run's metrics, in the first of its processes. On resume it first cuts the files back to the step.

    num_steps: of the whole run; step: the last one that is done; timer: measures phases of a step"""

    def __init__(self, output: str | Path, *, num_steps: int, step: int = 0, tensorboard: bool = False) -> None:
        self.output = Path(output)
        self.num_steps = num_steps
        self.writer = None
        if distributed.is_main_process():
            for name in LOG_FILES:
                truncate_after_step(self.output / name, step or -1)  # a run without a checkpoint scores its start again
            self.writer = tensorboard_writer(self.output / "tensorboard", step) if tensorboard else None
        self.columns: list[str] = []
        self.num_rows = 0
        self.timer = Timer()

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of a step, its times since the last one, and a row of the table.

        metrics: values that do not depend on the clock, among them num_tokens, the tokens of the step. Those of step 0,
        the start of the run, are of held-out data alone"""
        if not distributed.is_main_process():
            return
        timing = self.timer.lap()
        if step:
            timing["tokens_per_second"] = metrics["num_tokens"] / timing["seconds"]
        append(self.output / "metrics.jsonl", {"step": step, **metrics})
        append(self.output / "timing.jsonl", {"step": step, **timing, "peak_memory_gib": peak_memory_gib()})
        if self.writer is not None:
            for name, value in {**metrics, **{f"time/{k}": v for k, v in timing.items()}}.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()
        if step:
            self._show(step, metrics, timing)
        else:
            self._show_held_out("before the first step, held out: ", metrics)

    def close(self) -> None:
        """Closes what is open."""
        if self.writer is not None:
            self.writer.close()

    def samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows of a step to samples.jsonl."""
        for row in rows if distributed.is_main_process() else ():
            append(self.output / "samples.jsonl", {"step": step, **row})

    def say(self, text: str) -> None:
        """Prints a line."""
        distributed.print_once(text)

    def _show(self, step: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
        console = Console()
        room = (console.width if console.is_terminal else PIPE_WIDTH) // (WIDTH + 2) - 2
        columns = [name for name in COLUMNS if name in metrics][:room]
        if not set(columns) <= set(self.columns):  # the first step, or the first after the value model's warm-up
            self.columns, self.num_rows = columns, 0
        if self.num_rows % ROWS_A_HEADER == 0:
            self.say(table_row(["step", *(COLUMNS[name] for name in self.columns), "tokens/s"]))
        self.num_rows += 1
        values = [short_number(metrics[name]) if name in metrics else "" for name in self.columns]
        self.say(table_row([f"{step}/{self.num_steps}", *values, f"{timing['tokens_per_second']:.0f}"]))
        phases = phase_texts(timing)
        if phases and (self.num_rows % ROWS_A_TIMING == 0 or step == self.num_steps):
            self.say("  time: " + ", ".join(phases))
        self._show_held_out("  held out: ", metrics)

    def _show_held_out(self, what: str, metrics: dict[str, float]) -> None:
        held_out = {name.removeprefix("eval/"): x for name, x in metrics.items() if name.startswith("eval/")}
        if held_out:
            self.say(what + held_out_text(held_out))

    @staticmethod
    @contextmanager
    def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A bar with tokens/s that lives during a phase: yields advance(num_tokens). Silent when not on a terminal.

        The first process shows it, as if the others were as far as it is."""
        console, num_processes = Console(stderr=True), distributed.world_size()
        shown = console.is_terminal and distributed.is_main_process()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
        start, done = time.perf_counter(), 0
        bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not shown)
        with bar:
            task = bar.add_task(what, total=total, rate="")

            def advance(num_tokens: int) -> None:
                nonlocal done
                done += num_tokens * num_processes
                bar.update(task, completed=done, rate=f"{done / (time.perf_counter() - start):.0f} tokens/s")

            yield advance


class Statistics:
    """Statistics of a minibatch, from those of its micro-batches: sums over one denominator, or extremes.

    values: by name; extremes: max or min, by the name of each value that is no sum"""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.extremes: dict[str, Extreme] = {}

    def add(self, prefix: str, values: dict[str, Tensor], *, extremes: dict[str, Extreme] | None = None) -> None:
        """Adds a micro-batch's share. extremes: which of the values are a maximum or a minimum."""
        self.extremes |= {prefix + name: extreme for name, extreme in (extremes or {}).items()}
        for key, value in values.items():
            name, value = prefix + key, value.detach()
            join = JOINS[self.extremes.get(name)]
            self.values[name] = join(self.values[name], value) if name in self.values else value

    def all_reduced(self) -> Statistics:
        """The statistics of the micro-batches of all processes."""
        if distributed.world_size() == 1:
            return self
        own, whole = {name: value.cpu() for name, value in self.values.items()}, Statistics()
        for values, extremes in distributed.all_gather((own, self.extremes)):
            whole.add("", values, extremes=extremes)
        return whole

    @staticmethod
    def mean(several: Sequence[Statistics]) -> dict[str, Tensor]:
        """The mean of several minibatches' statistics, or their extremes, over the minibatches that have them."""
        extremes = {name: extreme for each in several for name, extreme in each.extremes.items()}
        means = {}
        for name in dict.fromkeys(name for each in several for name in each.values):
            values = torch.stack([each.values[name] for each in several if name in each.values])
            means[name] = MEANS[extremes.get(name)](values)
        return means


class Timer:
    """Seconds and tokens of named phases, and seconds of the whole, since the last lap. Phases are not nested."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.running: str | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, self.running = time.perf_counter(), name
        try:
            yield
        finally:
            self.running = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or the next phase would wait for the work of this one
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    def count(self, tokens: int) -> None:
        """Adds tokens to the phase that is running, if one is."""
        if self.running is not None:
            self.tokens[self.running] = self.tokens.get(self.running, 0) + tokens

    def lap(self) -> dict[str, float]:
        """The times since the last lap: seconds; NAME_seconds of each phase, NAME_share, its share of them, and, where
        tokens were counted, NAME_tokens_per_second."""
        now = time.perf_counter()
        times = {"seconds": now - self.start}
        for name, seconds in self.phases.items():
            times |= {f"{name}_seconds": seconds, f"{name}_share": seconds / times["seconds"]}
            if name in self.tokens:
                times[f"{name}_tokens_per_second"] = self.tokens[name] / seconds
        self.start, self.phases, self.tokens = now, {}, {}
        return times


def held_out_text(metrics: dict[str, float]) -> str:
    """Metrics of held-out data in words: counts with what they count, the ends of an interval with what it is of, and
    those of each head, HEAD/NAME, apart."""
    heads: dict[str, list[str]] = {"": []}
    ends = {f"{name}_{end}" for name in metrics for end in ("low", "high")}
    for name, value in metrics.items():
        head, _, kind = name.rpartition("/")
        text = f"{value:.0f} {COUNTS[kind]}" if kind in COUNTS else f"{kind} {short_number(value)}"
        if f"{name}_low" in metrics:
            text += (
                f" (95 % interval {short_number(metrics[f'{name}_low'])} to {short_number(metrics[f'{name}_high'])})"
            )
        if name not in ends:
            heads.setdefault(head, []).append(text)
    return "; ".join((f"{head}: " if head else "") + ", ".join(texts) for head, texts in heads.items())


def phase_texts(timing: dict[str, float]) -> list[str]:
    """A text for each phase of a lap: its share of the time, and its tokens a second where they were counted."""
    names = [name.removesuffix("_share") for name in timing if name.endswith("_share")]
    texts = []
    for name in names:
        rate = timing.get(f"{name}_tokens_per_second")
        texts.append(f"{name} {timing[f'{name}_share']:.0%}" + (f" at {rate:.0f} tokens/s" if rate else ""))
    return texts


def table_row(cells: list[str]) -> str:
    """Cells of equal width, two spaces apart, numbers to the right."""
    return "  ".join(f"{cell:>{WIDTH}}" for cell in cells)


def short_number(value: float) -> str:
    """A number in at most WIDTH characters."""
    return min((f"{value:.{digits}g}" for digits in (4, 3, 2)), key=lambda text: len(text) > WIDTH)


def reset_peak_memory() -> float:
    """Lets `peak_memory_gib` begin anew, where the system can do that; returns what it says then."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux
    return peak_memory_gib()


def peak_memory_gib() -> float:
    """Peak memory of the process, or of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def tensorboard_writer(folder: Path, step: int = 0) -> Any:
    """A TensorBoard writer that hides what was written after `step`.

    Raises: ModuleNotFoundError naming the extra where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingPackageError("tensorboard is not installed: pip install 'fastrlhf[tensorboard]'") from None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
