"""The output folder of a run: held by its process, begun anew, continued, or refused.

<output>/config.yaml    the resolved configuration; its first line marks the folder as ours
<output>/inputs.json    fingerprints of the models, files and functions that the configuration names
<output>/steps.json     after which steps the models in model/ and best/ were written
<output>/.lock          the process that writes here; .deleting: what an overwriting run has yet to delete
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from fastrlhf.runs.checkpoint import LINES, newest_whole, settings_of_checkpoints
from fastrlhf.runs.inputs import changed, inputs_of, is_function, pieces_of
from fastrlhf.runs.lock import LOCK, Lock, check_free_below
from fastrlhf.runs.whole import discard, remove, write_file, write_json
from fastrlhf.settings.values import dump

MARK = "# settings of a fastrlhf run\n"
KIND = "# kind: "  # of the settings, on the second line
CONFIG, INPUTS, STEPS, DELETING = "config.yaml", "inputs.json", "steps.json", ".deleting"
OURS = (CONFIG, INPUTS, STEPS, *LINES, "checkpoints", "model", "best", "tensorboard")
# what holds no work: without anything else in it, a folder is free
NO_WORK = {LOCK, CONFIG, INPUTS, STEPS, "rows.crc32", "timing.jsonl", "samples.jsonl"}
# a resumed run may change how it runs, not what it computes
MAY_DIFFER = {
    "resume",
    "overwrite",
    "save_every",
    "save_minutes",
    "keep_checkpoints",
    "samples_every",
    "max_slots",
    "kv_budget",
    "cuda_graphs",
    "max_rejected",
    "judge_requests",
    "judge_timeout",
    "judge_key_file",
    "rollout_url",
    "weight_sync",
    "tensorboard",
    "device",
    "output",
    "max_tokens",
    "gradient_checkpointing",
    "share_prompts",
    "parallel",
    "offload",
}


class OutputFolder:
    """Holds the output folder of a run from now until `close`, and changes nothing in it before `open`: so that it can
    be made before long work, and `open` called after it.

    config: of a loop or a job: output, overwrite, resume
    ours: names of what the run writes; only these are deleted, other files stay
    cheap: those of them that hold no work, since a run makes them in no time
    hold: False in the other processes of a run, of which the first holds the folder
    is_resumed: whether an earlier run goes on; checkpoint: its newest one that is whole, None if there is none;
    changes: what it changes of its plan (`may_change` of its settings), as lines to print

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
                raise FileExistsError(f"output: {folder} is a file, expected a folder")
        self.lock = Lock(self.path) if hold else None
        self.changes: list[str] = []
        try:
            if hold and (self.path / DELETING).exists():
                self._delete()
            self.is_resumed = self._is_resumed()
            self.checkpoint = newest_whole(self.path) if self.is_resumed else None
        except BaseException:
            self.close()
            raise

    def open(self) -> None:
        """Makes the folder ready: deletes an earlier run, unless it is resumed, and writes config.yaml. From one moment
        to the next the earlier run counts as deleted: a kill leaves all of it or nothing."""
        self.check()
        discard(self.path / f"{DELETING}.partial")  # of an overwriting run that was killed before it began
        if not self.is_resumed:
            there = [name for name in self.ours if name != CONFIG and os.path.lexists(self.path / name)]
            if there:
                write_json(self.path / DELETING, there)
                self._delete()
        kind = type(self.config).__name__
        write_file(self.path / CONFIG, (f"{MARK}{KIND}{kind}\n" + dump(self.config)).encode())
        write_json(self.path / INPUTS, self._inputs())

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
        if not (config.resume or config.overwrite):
            raise FileExistsError(
                f"output: {self.path} is not empty: --resume (resume=True) continues, --overwrite deletes it"
            )
        text = _read(self.path / CONFIG)
        if not (text or "").startswith(MARK) and not settings_of_checkpoints(self.path):
            raise FileExistsError(
                f"output: {self.path} holds no fastrlhf run (no {CONFIG} of one), so it is left alone"
            )
        kind = re.search(rf"^{KIND}(\w+)$", text or "", re.MULTILINE)
        if kind and kind[1] != type(config).__name__ and (config.resume or not {*names} <= {*self.ours}):
            raise FileExistsError(
                f"output: {self.path} holds a run of another kind ({kind[1]}, not {type(config).__name__}): give "
                "another folder, or delete that one"
            )
        if config.overwrite:
            self._check_reads_nothing_deleted()
            return False
        saved = _settings(text) or self._settings_of_checkpoint()
        self.changes = check_same(config, saved, may_change=getattr(config, "may_change", ()))
        return True

    def _work(self) -> list[str]:
        """What the folder holds that took work, or that is not ours; without such it is free."""
        work = []
        for path in sorted(self.path.iterdir()):
            if path.name not in {*self.cheap, "tensorboard"} and _holds_work(path):
                work.append(path.name)
        if work == ["best", "metrics.jsonl"] and not _has_steps(self.path / "metrics.jsonl"):
            return []  # a held-out score of the model that the run began with
        unmarked = [name for name in NO_WORK - {LOCK} if (self.path / name).exists()]
        if unmarked and not work and not (_read(self.path / CONFIG) or "").startswith(MARK):
            return sorted(unmarked)  # files of these names that are somebody else's
        return work

    def _check_reads_nothing_deleted(self) -> None:
        deleted = [(self.path / name).resolve() for name in self.ours if name != CONFIG and (self.path / name).exists()]
        for field in fields(self.config):
            for piece in pieces_of(getattr(self.config, field.name)) if field.name != "output" else ():
                for folder in deleted if os.path.exists(piece) else ():
                    if Path(piece).resolve().is_relative_to(folder):
                        raise ValueError(
                            f"overwrite: {field.name} reads {piece}, which lies in {self.path} and would be deleted; "
                            "give another output, or copy it elsewhere first"
                        )
        for name in self.ours:
            check_free_below(self.path / name)

    def _settings_of_checkpoint(self) -> dict[str, Any]:
        """The settings of the run, of which config.yaml is damaged or missing."""
        found = settings_of_checkpoints(self.path)
        what = f"{self.path / CONFIG} is damaged or missing"
        if not found:
            raise ValueError(f"output: {what}, and no checkpoint has a copy; --overwrite starts anew")
        warnings.warn(f"resume: {what}; that of {found[0]} is taken", stacklevel=2)
        return _settings(_read(found[0])) or {}

    def _delete(self) -> None:
        """Deletes what the file .deleting names, or the rest of it, and then that file."""
        try:
            names = json.loads((self.path / DELETING).read_text(encoding="utf-8"))
            names = [name for name in names if Path(name).name == name]
        except (OSError, ValueError, TypeError):
            names = list(self.ours)
        for name in names:
            remove(self.path / name)
        (self.path / DELETING).unlink()

    def _inputs(self) -> Any:
        return inputs_of(self.config, leave_out=MAY_DIFFER)


def check_same(config: Any, saved: dict[str, Any], *, may_change: Collection[str] = ()) -> list[str]:
    """Raises ValueError when settings, or the models and files that they name, are not those of the run in their output
    folder; warns when the source of a function is not. A folder may have moved, with what the run reads or alone.
    Returns lines on those of may_change that differ."""
    changes = []
    now, output = yaml.safe_load(dump(config)), Path(config.output)
    defaults = {field.name: field.default for field in fields(config) if field.default is not MISSING}
    then_inputs, inputs = _saved_inputs(output), inputs_of(config, leave_out=MAY_DIFFER)
    for name in {**now, **saved}:
        before, after = saved.get(name, defaults.get(name)), now.get(name)
        same = name in MAY_DIFFER or before == after or (isinstance(before, tuple) and list(before) == after)
        if not same and name in may_change:
            changes.append(f"{name} was {before} and is {after}")
        elif not same and not _moved(before, after, saved.get("output"), output):
            pieces = then_inputs.get(name, {}), inputs.get(name, {})
            if not (_without(before, pieces[0]) == _without(after, pieces[1]) and pieces[0] and pieces[1]):
                raise ValueError(
                    f"resume: {name} was {before!r} and is {after!r}; give the same, or --overwrite to start anew"
                )
    for name, piece, file in changed(then_inputs, inputs):
        if is_function(piece):
            text = (
                f"resume: the source of {piece} ({name}) has changed since the run began; it goes on with the new one"
            )
            warnings.warn(text, stacklevel=2)
        else:
            where = piece if os.path.isfile(piece) else f"{piece} ({file})"
            raise ValueError(
                f"resume: {name}: {where} has changed since the run began; restore it, or --overwrite to start anew"
            )
    return changes


def check_finished(config: Any) -> None:
    """Raises ValueError unless the run in the output folder, if there is one, has these settings: of a run that is part
    of a job, which reads what it left."""
    text = _read(Path(config.output) / CONFIG)
    if text is not None and (saved := _settings(text)) is not None:
        check_same(config, saved)


def _holds_work(path: Path) -> bool:
    """Whether a file, or one in a folder, took work. A kill leaves what is .partial, and empty files."""
    if path.name in NO_WORK or path.name.endswith(".partial"):
        return False
    if path.is_symlink() or not path.is_dir():
        return path.is_symlink() or path.stat().st_size > 0
    return any(map(_holds_work, path.iterdir()))


def _has_steps(path: Path) -> bool:
    """Whether a file of metrics has more than the line of step 0."""
    try:
        return any(json.loads(line)["step"] != 0 for line in path.read_bytes().splitlines())
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _settings(text: str | None) -> dict[str, Any] | None:
    """The settings in config.yaml; None if it is damaged."""
    try:
        values = yaml.safe_load(text or "")
    except yaml.YAMLError:
        return None
    return values if isinstance(values, dict) and all(isinstance(name, str) for name in values) else None


def _saved_inputs(output: Path) -> Any:
    try:
        found = json.loads((output / INPUTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run of before there were such, or damaged
        return {}
    return found if isinstance(found, dict) else {}


def _moved(before: Any, after: Any, then: Any, output: Path) -> bool:
    """Whether two values name the same places, seen from the output folders of then and now."""
    if not (isinstance(before, str) and isinstance(after, str) and isinstance(then, str)):
        return False
    pairs = [re.split(r"([,;()=#])", value) for value in (before, after)]
    if len(pairs[0]) != len(pairs[1]):
        return False
    both = zip(*pairs, strict=True)
    return all(a == b or os.path.relpath(a or ".", then) == os.path.relpath(b or ".", output) for a, b in both)


def _without(value: Any, pieces: dict[str, Any]) -> str:
    """A value with what its paths hold in the place of their names."""
    text = str(value)
    for piece in sorted(pieces, key=len, reverse=True):
        text = text.replace(piece, json.dumps(pieces[piece], sort_keys=True))
    return text
