"""Runs of a command that nothing disturbs, and runs killed half-way: what the trials compare and begin with."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from commands import RANKS, arguments
from processes import Process, snapshot, start

from fastrlhf.runtime.atomic_io import remove


@dataclass(frozen=True)
class Whole:
    """An undisturbed run. left: checksums of its files; events: on files; seconds: that it took"""

    left: dict[str, str]
    events: int
    seconds: float


def whole_run(command: str, rows: str, out: Path, *more: str) -> Whole:
    """Runs a command. Raises: RuntimeError when it fails."""
    begun = time.monotonic()
    process = begin(command, rows, out, *more)
    if process.wait() != 0:
        raise RuntimeError(f"{command}: an undisturbed run fails: {process.said[-2000:]}")
    return Whole(snapshot(out), process.noted["num"], time.monotonic() - begun)


def half_run(command: str, rows: str, out: Path, whole: Whole) -> None:
    """Leaves what a kill after two thirds of a run's events leaves."""
    begin(command, rows, out, kill_at=2 * whole.events // 3).wait()


def begin(
    command: str, rows: str, out: Path, *more: str, name: str = "a", kill_at: int | None = None, **how: float
) -> Process:
    """Starts a command of the campaign. name: of its log beside the folder; kill_at, how: as of `start`"""
    log = out.with_name(f"{name}.log")
    return start(arguments(command, rows, *more), out, log, kill_at=kill_at, ranks=RANKS.get(command, 1), **how)


def restored(saved: Path | None, out: Path) -> None:
    """Makes the output folder what it was."""
    remove(out)
    if saved is not None:
        shutil.copytree(saved, out, symlinks=True)
