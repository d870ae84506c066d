"""The output folder of a run: held by its process, begun anew, continued, or refused.

<output>/config.yaml    the resolved configuration; its first line marks the folder as ours
<output>/inputs.json    fingerprints of the models, files and functions that the configuration names
<output>/steps.json     after which steps the models in model/ and best/ were written; how many are planned
<output>/products.json  the files of model/ and best/
<output>/rollout_weights  weights on their way to the servers of PPO's rollouts
<output>/.lock          the process that writes here; .deleting: what an overwriting run has yet to delete
"""

from __future__ import annotations

import glob
import json
import os
import random
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastrlhf.errors import MissingFileError, OutputError, ProtectedError, UserError
from fastrlhf.runtime import distributed
from fastrlhf.runtime.atomic_io import REPLACED, discard, recover, remove, write_file, write_json
from fastrlhf.runtime.checkpoint import LOG_FILES, newest_undamaged_checkpoint, settings_of_checkpoints
from fastrlhf.runtime.fingerprints import base_of, inputs_of, pieces_of
from fastrlhf.runtime.lock import LOCK, Lock, check_free_above, check_free_below
from fastrlhf.runtime.products import PRODUCTS, check_products
from fastrlhf.runtime.resume_check import CONFIG, INPUTS, check_same, read, settings_in
from fastrlhf.runtime.resume_hint import LOOPS, command_of, describe_progress, extending, is_finished
from fastrlhf.settings.training import TrainerConfig
from fastrlhf.settings.values import dump, options_where

MARK = "# settings of a fastrlhf run\n"
KIND = "# kind: "  # of the settings, on the second line
STEPS, DELETING = "steps.json", ".deleting"
ROLLOUT_WEIGHTS = "rollout_weights"
OURS = (CONFIG, INPUTS, STEPS, PRODUCTS, *LOG_FILES, "checkpoints", "model", "best", "tensorboard", ROLLOUT_WEIGHTS)
BEGUN = {LOCK, f"{CONFIG}.partial", f"{DELETING}.partial"}  # what there may be before config.yaml
# what holds no work: a folder of ours without anything else is free
NO_WORK = {LOCK, CONFIG, INPUTS, STEPS, PRODUCTS, "rows.crc32", "timing.jsonl", "samples.jsonl", ROLLOUT_WEIGHTS}


class OutputFolder:
    """Holds the folder until `close`. Nothing in it changes before `open`, so make this first, load, then call `open`.

    config: of a loop or a job: output, overwrite, resume
    ours: names of what the run writes; only these are deleted, other files stay
    cheap: the stages among them that are done in no time, and count for no work
    hold: False in the other processes of a run, of which the first holds the folder
    is_resumed: whether an earlier run goes on; checkpoint: its newest one that is whole, None if there is none;
    changes: what it changes of its plan (resume="plan" of an option), as lines to print

    Raises: FolderInUseError, naming the process that holds the folder; FileExistsError for a folder that is not empty
    without resume or overwrite, or that holds no run of ours; ValueError when a resumed run's settings, models, files
    or functions differ in what they compute, when no checkpoint of it is whole, and when an overwriting run would
    delete what it reads."""

    def __init__(
        self, config: Any, ours: Sequence[str] = OURS, *, cheap: Iterable[str] = (), hold: bool = True
    ) -> None:
        self.config, self.path, self.ours, self.cheap = config, Path(config.output), ours, set(cheap)
        for folder in (self.path, self.path / "checkpoints"):
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"output: {folder} is a file, expected a folder")
        if (self.path / "checkpoints").is_symlink() and not (self.path / "checkpoints").exists():
            raise MissingFileError(
                f"output: {self.path / 'checkpoints'} is a link to what is not there: bring that back (is its disk "
                "mounted?), or delete the link to do without those checkpoints"
            )
        for name in (CONFIG, INPUTS, STEPS, PRODUCTS, "timing.jsonl"):
            if (self.path / name).is_dir() or ((self.path / name).is_symlink() and not (self.path / name).exists()):
                raise OutputError(f"output: {self.path / name} is no file, as a run has it: delete it to go on")
        self.lock = Lock(self.path) if hold else None
        self.changes: dict[str, str] = {}
        try:
            check_free_above(self.path)
            self._check_writable()
            if hold:
                self._finish_what_was_killed()
            self.is_resumed = self._is_resumed()
            self.checkpoint = newest_undamaged_checkpoint(self.path) if self.is_resumed else None
        except BaseException:
            self.close()
            raise

    def open(self) -> None:
        """Deletes an earlier run unless it is resumed, then writes config.yaml. A kill leaves the earlier run whole or
        deleted."""
        if self.lock is not None:
            self.lock.claim()
        discard(self.path / f"{DELETING}.partial")  # of an overwriting run that was killed before it began
        for leftover in (self.path / "checkpoints").glob("*.partial"):  # of a checkpoint that was being deleted
            discard(leftover)
        if not self.is_resumed:
            there = [name for name in self.ours if name != CONFIG and os.path.lexists(self.path / name)]
            if there:
                write_json(self.path / DELETING, there)
                self._delete()
        kind = type(self.config).__name__
        write_file(self.path / CONFIG, (f"{MARK}{KIND}{kind}\n" + dump(self.config)).encode())
        write_json(self.path / INPUTS, inputs_of(self.config))

    def check(self) -> None:
        """Raises RuntimeError when the folder is no longer held by this run."""
        if self.lock is not None:
            self.lock.check()

    def close(self) -> None:
        """Lets other processes have the folder."""
        if self.lock is not None:
            self.lock.release()

    def _is_resumed(self) -> bool:
        """Whether the folder holds a run that is to be continued. Raises: as the class."""
        config = self.config
        if not self.path.exists() or not (names := self._work()):
            return False
        text = read(self.path / CONFIG)
        if not (config.resume or config.overwrite):
            raise OutputError(f"output: {self.path} is not empty: {self._found(text, names)}")
        if not (text or "").startswith(MARK) and not settings_of_checkpoints(self.path):
            raise OutputError(f"output: {self.path} holds no fastrlhf run (no {CONFIG} of one), so it is left alone")
        kind = _kind_in(text)
        if kind and kind != type(config).__name__ and (config.resume or not {*names} <= {*self.ours}):
            raise OutputError(
                f"output: {self.path} holds a run of another kind ({kind}, not {type(config).__name__}): give "
                "another folder, or delete that one"
            )
        if config.overwrite:
            self._check_reads_nothing_deleted()
            return False
        saved = settings_in(text) or self._settings_of_checkpoint()
        self.changes = check_same(config, saved, may_change=options_where(config, resume="plan"))
        return True

    def _found(self, text: str | None, names: list[str]) -> str:
        """What run the folder holds, and the ways on. text: of its config.yaml; names: of what took work."""
        if not (text or "").startswith(MARK) and not settings_of_checkpoints(self.path):
            return f"it holds no fastrlhf run (no {CONFIG} of one); give another folder"
        here, kind = type(self.config).__name__, _kind_in(text)
        found = describe_progress(self.path, kind or here)
        ways = ["--resume (resume=True) continues it"] if kind in (None, here) else []
        if ways and command_of(here) in LOOPS and is_finished(self.path, here):
            ways = [f"--resume (resume=True) with {extending(self.config)} extends it"]
        if ways or {*names} <= {*self.ours}:
            ways.append("--overwrite (overwrite=True) deletes it")
        return f"it holds {found}; {', '.join([*ways, 'or give another folder' if ways else 'give another folder'])}"

    def _work(self) -> list[str]:
        """What the folder holds that took work, or that is not ours; without such it is free."""
        if not _is_ours(self.path):
            return [path.name for path in sorted(self.path.iterdir()) if path.name not in BEGUN and _has_files(path)]
        left_out = {"tensorboard", *(self.cheap if (self.path / "timing.jsonl").exists() else ())}
        work = [name for name in _work_in(self.path) if name not in left_out]
        if {*work} <= {"best", "metrics.jsonl"} and not _has_steps(self.path / "metrics.jsonl"):
            return []  # the held-out score of the model that the run began with
        return work

    def _check_reads_nothing_deleted(self) -> None:
        check_reads_none_of(self.config, [self.path / name for name in self.ours if name != CONFIG])
        for name in self.ours:
            check_free_below(self.path / name)

    def _settings_of_checkpoint(self) -> dict[str, Any]:
        """The settings of the run, of which config.yaml is damaged or missing."""
        found = settings_of_checkpoints(self.path)
        what = f"{self.path / CONFIG} is damaged or missing"
        if not found:
            raise UserError(f"output: {what}, and no checkpoint has a copy; --overwrite starts anew")
        warnings.warn(f"resume: {what}; that of {found[0]} is taken", stacklevel=2)
        return settings_in(read(found[0])) or {}

    def _check_writable(self) -> None:
        for path in [self.path, *(self.path / name for name in self.ours)]:
            if path.is_dir() and not path.is_symlink() and not os.access(path, os.W_OK | os.X_OK):
                raise ProtectedError(f"output: {path} is write-protected, so a run cannot write or replace it")

    def _finish_what_was_killed(self) -> None:
        for pattern in (f"*{REPLACED}", f"checkpoints/*{REPLACED}"):
            for aside in self.path.glob(pattern):
                recover(aside.with_name(aside.name.removesuffix(REPLACED)))
        remove(self.path / f"{PRODUCTS}.partial")  # a run that is finished writes no other
        if (self.path / DELETING).exists():
            self._delete()

    def _delete(self) -> None:
        """Deletes what the file .deleting names, or the rest of it, and then that file."""
        try:
            names = json.loads((self.path / DELETING).read_text(encoding="utf-8"))
            names = [name for name in names if Path(name).name == name]
        except (OSError, ValueError, TypeError, RecursionError):
            names = list(self.ours)
        for name in names:
            remove(self.path / name)
        (self.path / DELETING).unlink()


def start_run(config: TrainerConfig) -> OutputFolder:
    """Joins the other processes of the run, if there are any, and seeds torch, numpy and Python: what a new head and a
    user's reward function draw from. Returns the output folder, which the first process holds.

    Raises: as OutputFolder and check_products; UserError when the processes see different output folders."""
    if distributed.start() == 1 and config.parallel == "fsdp":
        raise UserError("parallel: fsdp needs several processes; torchrun starts them (docs/parallel.md)")
    folder = OutputFolder(config) if distributed.is_main_process() else None
    distributed.all_gather(None)
    folder = folder or OutputFolder(config, hold=False)
    found = distributed.all_gather(str(folder.checkpoint))  # none goes on, and writes there, before all have looked
    if len(set(found)) > 1:
        raise UserError(
            f"output: all processes must see the same folder {config.output}, but their newest "
            f"checkpoints are {', '.join(found)}"
        )
    if folder.is_resumed:
        check_products(folder.path)
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)
    random.seed(config.seed)
    return folder


def check_reads_none_of(config: Any, deleted: Iterable[Path]) -> None:
    """Raises ValueError when the settings name one of these files and folders, or what is in them, to be read."""
    there = [path.resolve() for path in deleted if path.exists()]
    for name in sorted(options_where(config, path="input") | options_where(config, path="file")):
        pieces = [*pieces_of(getattr(config, name, None))]
        pieces += filter(None, map(base_of, pieces))
        for path in (path for piece in pieces for path in _places(piece)):
            if any(path.is_relative_to(each) or path == each.parent for each in there):
                raise UserError(
                    f"overwrite: {name} reads {path}, which lies in {config.output} and would be deleted; "
                    "give another output, or copy it elsewhere first"
                )


def _kind_in(text: str | None) -> str | None:
    """The class of the settings in a config.yaml, as its second line names it."""
    kind = re.search(rf"^{KIND}(\w+)$", text or "", re.MULTILINE)
    return kind[1] if kind else None


def _is_ours(folder: Path) -> bool:
    return (read(folder / CONFIG) or "").startswith(MARK)


def _work_in(folder: Path) -> list[str]:
    """The names in a run's folder of what took work; in a folder of a stage, which is a run's too, likewise. A kill
    leaves what is .partial, and empty files."""
    named = [path for path in sorted(folder.iterdir()) if path.name not in NO_WORK and path.suffix != ".partial"]
    return [path.name for path in named if (_work_in(path) if _is_ours(path) else _has_files(path))]


def _has_files(path: Path) -> bool:
    """Whether a path is a file that is not empty, a link, or a folder with such in it."""
    if path.is_symlink() or not path.is_dir():
        return path.is_symlink() or path.stat().st_size > 0
    return any(_has_files(each) for each in path.iterdir() if each.suffix != ".partial")


def _places(piece: str) -> list[Path]:
    """What a path or a glob names."""
    names = [piece] if os.path.exists(piece) else glob.glob(piece, recursive=True)
    return [Path(name).resolve() for name in names]


def _has_steps(path: Path) -> bool:
    """Whether a file of metrics has more than the line of step 0."""
    try:
        return any(json.loads(line)["step"] != 0 for line in path.read_bytes().splitlines())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True
