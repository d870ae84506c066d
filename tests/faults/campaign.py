"""The trials of a campaign: done once each, noted as lines of JSON, gone on with after a stop."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import files
import kills
import overwriting
import pairs_of_processes
import rows
import servers
from commands import COMMANDS, OF_ROWS, RANKS
from outcomes import GOOD, Outcome, Trials
from processes import HungError

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Kind:
    """trials: of a command, in a folder, so many; commands: for which there are such"""

    trials: Callable[[str, Path, int], Trials]
    commands: Collection[str]


KINDS = {
    "kills": Kind(kills.trials, COMMANDS),
    "overwriting": Kind(overwriting.trials, set(COMMANDS) - set(RANKS)),
    "pairs": Kind(pairs_of_processes.trials, COMMANDS),
    "files": Kind(files.trials, set(COMMANDS) - set(RANKS)),
    "rows": Kind(rows.trials, OF_ROWS),
    "servers": Kind(servers.trials, servers.COMMANDS),
}
SAMPLED = ("files", "rows", "servers")


@dataclass(frozen=True)
class Task:
    """Trials of one kind, of one command."""

    kind: str
    command: str
    number: int


class Campaign:
    """folder: of the notes; work: of the inputs, where the trials run; sample: share of the trials of SAMPLED that is
    done"""

    def __init__(self, folder: Path, work: Path, seed: int, sample: float) -> None:
        self.path, self.work, self.seed, self.sample = folder / "trials.jsonl", work, seed, sample
        folder.mkdir(parents=True, exist_ok=True)
        begun = {"program": program(), "seed": seed}
        if not self.path.exists() or json.loads(self.path.read_text().split("\n")[0]) != begun:
            self.path.write_text(json.dumps(begun) + "\n")
        self.done = {(row["kind"], row["command"], row["trial"]) for row in self.read()}

    def read(self) -> list[dict[str, Any]]:
        """The notes on the trials; a line that a stop cut is left out."""
        lines = self.path.read_text().split("\n")[1:-1]
        return [json.loads(line) for line in lines if line.endswith("}")]

    def run(self, task: Task) -> str:
        """Does the trials of a task that are not done; returns a line on them."""
        folder, begun, ends = self.work / f"{task.kind}-{task.command}".replace(" ", "-"), time.monotonic(), []
        if (task.kind, task.command, f"all {task.number} {self.sample}") in self.done:
            return f"{task.kind:<12}{task.command:<12} was done"
        folder.mkdir()
        try:
            for name, attempt in KINDS[task.kind].trials(task.command, folder, task.number):
                rng = Random(f"{self.seed} {task.kind} {task.command} {name}")
                drawn = task.kind not in SAMPLED or rng.random() < self.sample
                if drawn and (task.kind, task.command, name) not in self.done:
                    ends.append(self._try(task, name, attempt, rng, folder))
        except (RuntimeError, HungError) as error:  # of an undisturbed run
            failed = Outcome("undisturbed", "unclear", str(error)[-1000:])
            ends.append(self._try(task, "undisturbed", lambda rng: failed, Random(), folder))
        self._note({"kind": task.kind, "command": task.command, "trial": f"all {task.number} {self.sample}"})
        bad = [end for end in ends if end not in (*GOOD, "skipped")]
        if not bad:
            shutil.rmtree(folder)
        seconds = time.monotonic() - begun
        return f"{task.kind:<12}{task.command:<12}{len(ends):>5} trials{seconds:>6.0f} s  " + ", ".join(
            bad or ["right"]
        )

    def _try(self, task: Task, name: str, attempt: Callable[[Random], Outcome], rng: Random, folder: Path) -> str:
        begun = time.monotonic()
        try:
            outcome = attempt(rng)
        except HungError as error:
            outcome = Outcome(name, "hung", str(error))
        except Exception:
            outcome = Outcome(name, "unclear", traceback.format_exc()[-1000:])
        is_bad = outcome.ended not in (*GOOD, "skipped")
        if is_bad and (folder / "out").exists():
            number = len(list(folder.glob("left-*")))
            shutil.copytree(folder / "out", folder / f"left-{number}", symlinks=True)
        note = {"kind": task.kind, "command": task.command, "trial": name, **vars(outcome), "is_bad": is_bad}
        self._note({**note, "seconds": round(time.monotonic() - begun, 2)})
        return outcome.ended

    def _note(self, row: dict[str, Any]) -> None:
        with open(self.path, "ab") as file:  # one write, as others write too
            os.write(file.fileno(), json.dumps(row).encode() + b"\n")


def program() -> str:
    """A checksum of the package and of the campaign: trials of another state of them say nothing of this one."""
    summed = hashlib.sha256()
    for path in sorted([*ROOT.glob("fastrlhf/**/*.py"), *ROOT.glob("tests/faults/*.py")]):
        summed.update(path.read_bytes())
    return summed.hexdigest()[:16]
