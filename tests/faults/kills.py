"""Kills while an earlier run is overwritten: what is left is the old run or the new one, and it can be gone on with."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

from commands import GOES_ON, READS_ITS_OWN, arguments
from processes import Process, differences, snapshot, start
from tally import Tally

from fastrlhf.runs.whole import remove


def whole_run(command: str, rows: str, out: Path, log: Path, *more: str) -> tuple[dict[str, str], Process, float]:
    """Runs a command undisturbed; returns what it left, its process, and the seconds that it took."""
    begun = time.monotonic()
    process = start(arguments(command, rows, *more), out, log)
    if process.wait() != 0:
        raise RuntimeError(f"{command}: an undisturbed run fails: {process.said[-2000:]}")
    return snapshot(out), process, time.monotonic() - begun


def try_kills(command: str, number: int, work: Path, seed: int) -> Tally:
    """The trials of a command: all in one folder, since runs know where they are."""
    tally, begun = Tally("kills", command), time.monotonic()
    folder = work / f"kills-{command}"
    folder.mkdir()
    out, saved, log = folder / "out", folder / "saved", folder / "a.log"
    old, _, _ = whole_run(command, "old", out, log)
    shutil.copytree(out, saved)
    new, process, seconds = whole_run(command, "new", out, log, "--overwrite")
    if old == new:
        raise RuntimeError(f"{command}: an old run is not told from a new one")
    events, rng = process.noted["num"], random.Random(f"{seed} {command}")
    for trial in range(number):
        remove(out)
        shutil.copytree(saved, out)
        # a third among the first events, which delete the old run; a third among all; a third at any time
        kill_at = [rng.randint(1, max(1, min(events, 24))), rng.randint(1, max(1, events)), None][trial % 3]
        process = start(arguments(command, "new", "--overwrite"), out, log, kill_at=kill_at)
        if kill_at is None:
            time.sleep(rng.uniform(0, seconds))
            process.kill()
        place = f"trial {trial}, killed {'at a time' if kill_at is None else f'before event {kill_at} of {events}'}"
        process.wait()
        tally.trials += 1
        _judge(command, out, old, new, tally, place)
        if tally.faults:
            shutil.copytree(out, folder / f"left-{trial}", dirs_exist_ok=True)
    _own_input(command, out, saved, tally, folder / "own.log")
    tally.seconds = time.monotonic() - begun
    return tally


def _judge(command: str, out: Path, old: dict, new: dict, tally: Tally, place: str) -> None:
    """Goes on with what a kill left: with the new settings, or, if the folder still is the old run, with those."""
    left, said = sorted(path.name for path in out.iterdir()) if out.exists() else [], []
    for which, expected in (("new", new), ("old", old)):
        process = start(arguments(command, which, GOES_ON.get(command, "--resume")), out, out.with_name("b.log"))
        status = process.wait()
        if status == 0:
            if words := differences(expected, snapshot(out)):
                tally.fault("wrong", f"{place}: the {which} run goes on, but {', '.join(words[:4])} (left were {left})")
            tally.counts[which] += 1
            return
        said.append(process.said.strip()[-300:])
        if "Traceback" in process.said:
            break
    tally.fault("lost", f"{place}: neither run goes on (left were {left}): {said}")


def _own_input(command: str, out: Path, saved: Path, tally: Tally, log: Path) -> None:
    """A run that would delete what it reads is refused, and nothing is changed."""
    if command not in READS_ITS_OWN:
        return
    remove(out)
    shutil.copytree(saved, out)
    before = snapshot(out)
    more = READS_ITS_OWN[command].format(out=out).split()
    process = start(arguments(command, "new", "--overwrite", *more), out, log)
    status = process.wait()
    tally.trials += 1
    if status in (1, 2) and "Traceback" not in process.said and snapshot(out) == before:
        tally.counts["refused"] += 1
    else:
        tally.fault("lost", f"{' '.join(more)} --overwrite: status {status}, {differences(before, snapshot(out))[:4]}")
