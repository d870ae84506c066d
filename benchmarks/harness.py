"""Timing of several functions against each other in one process, with the machine's own limits beside them.

report = Report("token_logprobs", {"cpu": [(2048, 32000)], "cuda": [(8192, 128256)], "tiny": [(8, 64)]})
for rows, size in report.sizes:
    expect_close("torch", theirs(), exact)                               # correct first,
    report.add("T=2048", compare({"fastrlhf": ours, "torch": theirs}))   # then timed; with --save on disk at once
report.finish()
"""

import argparse
import csv
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine, synchronize
from benchmarks.tables import rows_in

RESULTS = Path(__file__).parent / "results"
FIRST = ("benchmark", "when", "case", "name", "median", "p20", "p80", "rounds", "ratio")  # columns of every CSV
SHORTEST_MS = 2.0  # quick functions are called this long for one measurement


@dataclass(frozen=True)
class Prepared:
    """A function whose arguments are made anew for every call, outside the timed region: run(*prepare())."""

    prepare: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    median: float
    p20: float
    p80: float
    rounds: int


def _once(function: Callable[[], Any] | Prepared, calls: int) -> float:
    """Milliseconds of one call, the average of `calls`; what a call returns is freed outside the timed region."""
    prepare, run = (function.prepare, function.run) if isinstance(function, Prepared) else (tuple, function)
    arguments, results = [prepare() for _ in range(calls)], []
    device = torch.get_default_device().type
    synchronize(device)
    start = time.perf_counter()
    for args in arguments:
        results.append(run(*args))
    synchronize(device)
    return (time.perf_counter() - start) * 1e3 / calls


def compare(
    functions: dict[str, Callable[[], Any] | Prepared], *, seconds: float = 5.0, min_rounds: int = 5
) -> dict[str, Timing]:
    """Returns the timing of each function: called in turn, round after round, so that a slow spell hits all of them.

    seconds: how long to go on; at least min_rounds rounds are made whatever they take."""
    calls = {}
    for name, function in functions.items():
        _once(function, 1)
        quick = not isinstance(function, Prepared)
        calls[name] = max(1, int(SHORTEST_MS / max(_once(function, 1), 1e-4))) if quick else 1
    times: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        begin, order = time.perf_counter(), list(functions)
        while len(times[order[0]]) < min_rounds or time.perf_counter() - begin < seconds:
            for name in order:
                times[name].append(_once(functions[name], calls[name]))
            order = order[1:] + order[:1]
    finally:
        gc.enable()
    return {name: _timing(values) for name, values in times.items()}


def _timing(values: list[float]) -> Timing:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), fifths[0], fifths[-1], len(values))


def expect_close(what: str, actual: Tensor, expected: Tensor, *, rtol: float = 1e-5, atol: float = 1e-5) -> float:
    """Returns the largest error; raises if `what` is wrong, because the time of a wrong result means nothing."""
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{what} is wrong: {text}"
    )
    return (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0


def peak_mib(function: Callable[[], Any] | Prepared) -> float:
    """The most memory in MiB that torch held at a time during one call, beyond what it held before."""
    prepare, run = (function.prepare, function.run) if isinstance(function, Prepared) else (tuple, function)
    arguments = prepare()
    if torch.get_default_device().type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(*arguments)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.autograd.profiler.profile(profile_memory=True) as recorded:
        result = run(*arguments)
    changes = [event.nbytes() for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    del result
    return max(itertools.accumulate(changes), default=0) / 2**20


def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """On a GPU, what repeats the kernels of a call without the time that Python takes to start each of them."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class Report:
    """Collects timings, prints them as they come, and saves them when the user asks for it with --save or --into.

    sizes: what there is to time on each device, and with --tiny, which shows in seconds whether it runs; `report.sizes`
        is that, or what --sizes says
    more: further command-line options, by flag the arguments of `add_argument`"""

    def __init__(
        self,
        name: str,
        sizes: dict[str, list[tuple[int, ...]]] | None = None,
        more: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}")
        parser.add_argument("--save", action="store_true", help="write benchmarks/results/<device>/<name>.csv")
        parser.add_argument(
            "--into", type=Path, help="write to this CSV file, beside what is there of other benchmarks"
        )
        parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch and ours")
        parser.add_argument("--seconds", type=float, default=5.0, help="how long each case is timed")
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to time")
        parser.add_argument("--tiny", action="store_true", help="in sizes that take no time, to see that it runs")
        if sizes:
            parser.add_argument("--sizes", nargs="+", type=_size, help="such as 2048x512x32000, in place of the usual")
        for flag, arguments in (more or {}).items():
            parser.add_argument(flag, **arguments)
        self.options, self.name, self.rows = parser.parse_args(), name, list[dict[str, Any]]()
        device, tiny = self.options.device, self.options.tiny
        if tiny and self.options.save:
            parser.error("--save keeps what was measured, which --tiny does not")
        self.sizes = (self.options.sizes or sizes["tiny" if tiny else device]) if sizes else []
        self.path = self.options.into or (RESULTS / device / f"{name}.csv" if self.options.save else None)
        torch.set_num_threads(self.options.threads)
        if device != "cpu":
            if not torch.cuda.is_available():
                parser.error("--device cuda, but torch sees no GPU")
            torch.set_default_device(device)
        torch.manual_seed(0)
        self.machine = machine(device, tiny)
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in self.machine.items()), flush=True)

    def add(self, case: str, timings: dict[str, Timing], **figures: dict[str, float]) -> None:
        """Adds one comparison; the first name is ours, and ratios say how many times longer the others take.

        figures: further columns, such as error={"fastrlhf": 1e-6}, by the names in `timings`."""
        ours = next(iter(timings.values()))
        print(f"\n{case:<44}{'median ms':>12}{'p20':>10}{'p80':>10}{'ratio':>8}")
        for name, timing in timings.items():
            more = {figure: values[name] for figure, values in figures.items() if name in values}
            row = {"case": case, "name": name, **asdict(timing), "ratio": timing.median / ours.median, **more}
            self.rows.append(row)
            extra = "".join(f"   {figure} {value:.3g}" for figure, value in more.items())
            numbers = f"{timing.median:>12.3f}{timing.p20:>10.3f}{timing.p80:>10.3f}{row['ratio']:>8.2f}"
            print(f"  {name:<42}{numbers}{extra}", flush=True)

        if self.path:
            self._write(self.path)

    def finish(self) -> None:
        """Says where the rows are."""
        if self.path:
            print(f"{self.name}: {len(self.rows)} rows are in {self.path}")

    def _write(self, path: Path) -> None:
        """Writes all rows so far, in place of those of the last run: what stops a run leaves the cases it finished."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [row for row in rows_in(path) if row["benchmark"] != self.name] if path.exists() else []
        rows += [{"benchmark": self.name, "when": when, **row, **self.machine} for row in self.rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        figures = sorted(set().union(*rows) - set(FIRST) - set(self.machine))
        with path.with_suffix(".new").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*FIRST, *figures, *self.machine], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        path.with_suffix(".new").replace(path)


def _size(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))
