"""Two processes on one output folder: one works, the other is refused in one line or finds the work done."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from random import Random

from commands import GOES_ON
from outcomes import Outcome, Trials, spoken
from processes import Process, differences, refusal, snapshot
from undisturbed import Whole, begin, half_run, restored, whole_run

# what each of the two is given, and what is in the folder before
MODES = {
    "fresh, fresh": ((), (), None),
    "resume, resume": (("--resume",), ("--resume",), "half"),
    "overwrite, overwrite": (("--overwrite",), ("--overwrite",), "old"),
    "fresh, resume": ((), ("--resume",), None),
    "fresh, overwrite": ((), ("--overwrite",), None),
    "resume, overwrite": (("--resume",), ("--overwrite",), "half"),
}


def trials(command: str, folder: Path, number: int) -> Trials:
    """number: of pairs"""
    out = folder / "out"
    saved = {None: None, "old": folder / "old", "half": folder / "half"}
    whole_run(command, "old", out)
    restored(out, folder / "old")
    restored(None, out)
    new = whole_run(command, "new", out)
    restored(None, out)
    half_run(command, "new", out, new)
    restored(out, folder / "half")
    modes = [mode for mode in MODES if command not in GOES_ON or "resume" not in mode]
    for trial in range(number):
        mode = modes[trial % len(modes)]
        yield f"{trial}", partial(_try, command, out, saved[MODES[mode][2]], mode, new)


def _try(command: str, out: Path, saved: Path | None, mode: str, new: Whole, rng: Random) -> Outcome:
    restored(saved, out)
    first, second, _ = MODES[mode]
    # at once, or while the first one works
    delay = rng.choice([0.0, rng.uniform(0, 0.05), rng.uniform(0, new.seconds)])
    both = [
        begin(command, "new", out, *given, name=name, delay=wait)
        for name, given, wait in (("a", first, 0.0), ("b", second, delay))
    ]
    for process in both:
        process.wait()
    ended, found = _judged(command, both, out, new)
    place = f"after {delay:.2f} s, statuses {[process.ended for process in both]}"
    return Outcome(f"two processes: {mode}", ended, f"{place}: {'; '.join(found)}" if found else "")


def _judged(command: str, both: list[Process], out: Path, new: Whole) -> tuple[str, list[str]]:
    kind, found = "wrong", []
    for process, other in (both, both[::-1]):
        why = refusal(process)
        if process.ended != 0 and why is None:
            kind, detail = spoken(process)
            found.append(f"not refused in a line: {detail}")
        elif why == "in use" and f"process {other.pid}" not in process.said:
            found.append(f"the process is not named: {process.said.strip()[-300:]!r}")
    if all(process.ended != 0 for process in both):
        found.append("neither ran")
    if _overlap(*(process.noted for process in both)):
        found.append("both wrote at the same time")
    if words := differences(new.left, snapshot(out)):
        found += words[:4]
        process = begin(command, "new", out, GOES_ON.get(command, "--resume"), name="c")
        if process.wait() != 0 or differences(new.left, snapshot(out)):
            kind = "lost"
            found.append(f"going on afterwards: status {process.ended}, {process.said.strip()[-300:]!r}")
    if found:
        return kind, found
    return ("refused" if any(map(refusal, both)) else "right"), []


def _overlap(one: dict, other: dict) -> bool:
    """Whether two processes wrote files of the folder at the same time."""
    if one["first"] is None or other["first"] is None:
        return False
    return max(one["first"], other["first"]) < min(one["last"], other["last"])
