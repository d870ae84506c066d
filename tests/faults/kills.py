"""Kills (SIGKILL) at any moment and at events on files; what goes on afterwards ends as an undisturbed run."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from random import Random

from commands import GOES_ON, RANKS
from outcomes import Outcome, Trials, judged
from undisturbed import Whole, begin, restored, whole_run

HOW = ("before an event on a file", "shortly after an event on a file", "at any time")
MOST = 3  # kills of a trial, one after the other


def trials(command: str, folder: Path, number: int) -> Trials:
    """number: of trials, each of one kill or more"""
    out = folder / "out"
    whole = whole_run(command, "new", out)
    restored(None, out)
    again = whole_run(command, "new", out)
    if whole.left != again.left:
        raise RuntimeError(f"{command}: two undisturbed runs differ")
    for trial in range(number):
        yield f"{trial}", partial(_try, command, out, whole, HOW[trial % len(HOW)])


def _try(command: str, out: Path, whole: Whole, how: str, rng: Random) -> Outcome:
    restored(None, out)
    kills, more, said = 0, [], []
    while kills < MOST:
        kill_at, linger = rng.randint(1, whole.events) if how != HOW[2] else None, 0.0
        if how == HOW[1]:
            linger = rng.uniform(0, 0.02)
        process = begin(command, "new", out, *more, kill_at=kill_at, linger=linger)
        if kill_at is None:
            time.sleep(rng.uniform(0, whole.seconds))
            # of the processes that torchrun started, one alone: the others have to end then
            process.kill([rng.choice(process.pids)] if command in RANKS else None)
        process.wait()
        said.append(f"{kill_at or 'any time'}: {process.ended}")
        if process.ended == 0:
            break
        if process.ended != -9 and 1 not in process.statuses.values():
            return Outcome(f"killed {how}", "unclear", f"{said}: {process.said.strip()[-300:]}", kills)
        kills += 1
        more = [GOES_ON.get(command, "--resume")]
        if rng.random() < 0.6:
            break
    process = begin(command, "new", out, GOES_ON.get(command, "--resume"), name="b")
    process.wait()
    ended, detail = judged(process, out, whole.left)
    ended = "lost" if ended == "refused" else ended
    return Outcome(f"killed {how}", ended, f"{said}: {detail}" if detail else "", kills)
