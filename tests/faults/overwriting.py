"""Kills while an earlier run is overwritten: what is left is the old run or the new one, and it can be gone on with."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from random import Random

from commands import GOES_ON, READS_ITS_OWN
from outcomes import Outcome, Trials, judged, spoken
from processes import differences, snapshot
from undisturbed import Whole, begin, restored, whole_run

FAULT = "killed while overwriting a run"


def trials(command: str, folder: Path, number: int) -> Trials:
    """number: of kills"""
    out, saved = folder / "out", folder / "saved"
    old = whole_run(command, "old", out)
    restored(out, saved)
    new = whole_run(command, "new", out, "--overwrite")
    if old.left == new.left:
        raise RuntimeError(f"{command}: an old run is not told from a new one")
    for trial in range(number):
        yield f"{trial}", partial(_try, command, out, saved, old, new, trial % 3)
    if command in READS_ITS_OWN:
        yield "its own input", partial(_try_own_input, command, out, saved)


def _try(command: str, out: Path, saved: Path, old: Whole, new: Whole, how: int, rng: Random) -> Outcome:
    restored(saved, out)
    # a third among the first events, which delete the old run; a third among all; a third at any time
    kill_at = [rng.randint(1, min(new.events, 24)), rng.randint(1, new.events), None][how]
    process = begin(command, "new", out, "--overwrite", kill_at=kill_at)
    if kill_at is None:
        time.sleep(rng.uniform(0, new.seconds))
        process.kill()
    kills = int(process.wait() == -9)
    place = f"killed {'at a time' if kill_at is None else f'before event {kill_at} of {new.events}'}"
    left = sorted(path.name for path in out.iterdir()) if out.exists() else []
    found = []
    for which, expected in (("new", new), ("old", old)):
        process = begin(command, which, out, GOES_ON.get(command, "--resume"), name="b")
        process.wait()
        ended, detail = judged(process, out, expected.left)
        if ended != "refused":
            detail = f"{place}, left were {left}, {which}: {detail}" if detail else ""
            return Outcome(FAULT, ended, detail, kills)
        found.append(detail)
    return Outcome(FAULT, "lost", f"{place}: neither run goes on (left were {left}): {found}", kills)


def _try_own_input(command: str, out: Path, saved: Path, rng: Random) -> Outcome:
    """A run that would delete what it reads is refused, and nothing is changed."""
    restored(saved, out)
    before = snapshot(out)
    process = begin(command, "new", out, "--overwrite", *READS_ITS_OWN[command].format(out=out).split())
    process.wait()
    ended, detail = spoken(process)
    if words := differences(before, snapshot(out)):
        ended, detail = "lost", f"{'; '.join(words[:5])} after: {detail}"
    return Outcome("reads what --overwrite deletes", "lost" if ended == "read" else ended, detail)
