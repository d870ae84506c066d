"""Two processes on one output folder: one works, the other is refused in one line or finds the work done."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

from commands import arguments
from kills import whole_run
from processes import Process, differences, refusal, snapshot, start
from tally import Tally

from fastrlhf.runs.whole import remove

# what each of the two is given, and what is in the folder before
MODES = {
    "fresh, fresh": ((), (), None),
    "resume, resume": (("--resume",), ("--resume",), "killed"),
    "overwrite, overwrite": (("--overwrite",), ("--overwrite",), "old"),
    "fresh, resume": ((), ("--resume",), None),
    "fresh, overwrite": ((), ("--overwrite",), None),
    "resume, overwrite": (("--resume",), ("--overwrite",), "killed"),
}


def try_pairs(command: str, number: int, work: Path, seed: int) -> Tally:
    """The trials of a command: all in one folder, since runs know where they are."""
    tally, begun = Tally("pairs", command), time.monotonic()
    folder = work / f"pairs-{command}"
    folder.mkdir()
    out, rng = folder / "out", random.Random(f"{seed} {command}")
    saved = {None: None, "old": folder / "old", "killed": folder / "killed"}
    whole_run(command, "old", out, folder / "a.log")
    shutil.copytree(out, folder / "old")
    remove(out)
    new, process, seconds = whole_run(command, "new", out, folder / "a.log")
    remove(out)
    process = start(arguments(command, "new"), out, folder / "a.log", kill_at=2 * process.noted["num"] // 3)
    process.wait()
    shutil.copytree(out, folder / "killed")
    for trial in range(number):
        mode = list(MODES)[trial % len(MODES)]
        remove(out)
        first, second, before = MODES[mode]
        if saved[before] is not None:
            shutil.copytree(saved[before], out)
        # at once, or while the first one works
        delay = rng.choice([0.0, rng.uniform(0, 0.05), rng.uniform(0, seconds)])
        both = [
            start(arguments(command, "new", *given), out, folder / f"{name}.log", delay=wait)
            for name, given, wait in (("a", first, 0.0), ("b", second, delay))
        ]
        for process in both:
            process.wait()
        tally.trials += 1
        num_faults = len(tally.faults)
        _judge(command, both, out, new, tally, f"trial {trial}, {mode} after {delay:.2f} s")
        if len(tally.faults) > num_faults:
            shutil.copytree(out, folder / f"left-{trial}")
    tally.seconds = time.monotonic() - begun
    return tally


def _judge(command: str, both: list[Process], out: Path, new: dict, tally: Tally, place: str) -> None:
    kind, found = "wrong", []
    for process, other in (both, both[::-1]):
        why = refusal(process)
        if process.ended != 0 and why is None:
            found.append(f"not refused in a line: {process.said.strip()[-300:]!r}")
        elif why == "in use" and f"process {other.pid}" not in process.said:
            found.append(f"the process is not named: {process.said.strip()[-300:]!r}")
    tally.counts["refused"] += any(map(refusal, both))
    if all(process.ended != 0 for process in both):
        found.append("neither ran")
    if _overlap(*(process.noted for process in both)):
        found.append("both wrote at the same time")
    if words := differences(new, snapshot(out)):
        found += words[:4]
        process = start(arguments(command, "new", "--resume"), out, out.with_name("c.log"))
        if process.wait() != 0 or differences(new, snapshot(out)):
            kind = "lost"
            found.append(f"--resume afterwards: status {process.ended}, {process.said.strip()[-300:]!r}")
    if found:
        tally.fault(kind, f"{place}, statuses {[process.ended for process in both]}: {'; '.join(found)}")


def _overlap(one: dict, other: dict) -> bool:
    """Whether two processes wrote files of the folder at the same time."""
    if one["first"] is None or other["first"] is None:
        return False
    return max(one["first"], other["first"]) < min(one["last"], other["last"])
