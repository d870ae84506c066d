"""Whether a run that is to be continued is the one in its output folder: its settings, and what they name."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Collection
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from fastrlhf.errors import UserError
from fastrlhf.runtime.checkpoint import settings_of_checkpoints
from fastrlhf.runtime.fingerprints import changed, inputs_of, is_function
from fastrlhf.settings.values import dump, options_where

CONFIG, INPUTS = "config.yaml", "inputs.json"


def check_same(config: Any, saved: dict[str, Any], *, may_change: Collection[str] = ()) -> dict[str, str]:
    """Raises ValueError when settings, or the models and files that they name, are not those of the run in their output
    folder; warns when the source of a function is not. A folder may have moved, with what the run reads or alone.
    Returns a line on each option of may_change that differs, by its name."""
    changes: dict[str, str] = {}
    differing = []
    now, output = yaml.safe_load(dump(config)), Path(config.output)
    defaults = {field.name: field.default for field in fields(config) if field.default is not MISSING}
    then_inputs, inputs = _saved_inputs(output), inputs_of(config)
    free = options_where(config, resume="free")  # how it runs, not what it computes
    for name in {**now, **saved}:
        before, after = saved.get(name, defaults.get(name)), now.get(name)
        same = name in free or before == after or (isinstance(before, tuple) and list(before) == after)
        if not same and name in may_change:
            changes[name] = f"{name} was {before} and is {after}"
        elif not same and not _moved(before, after, saved.get("output"), output):
            pieces = then_inputs.get(name, {}), inputs.get(name, {})
            if not (_without(before, pieces[0]) == _without(after, pieces[1]) and pieces[0] and pieces[1]):
                differing.append(f"{name} was {before!r} and is {after!r}")
    named = {text.partition(" ")[0] for text in differing}
    edited = [text for text in _edited(then_inputs, inputs) if text.partition(":")[0] not in named]
    if differing or edited:
        raise UserError(_refusal(differing, edited, output))
    return changes


def _edited(then_inputs: Any, inputs: Any) -> list[str]:
    """Which of the files and models that the settings name have changed; warns of functions."""
    found: dict[str, list[str]] = {}
    for name, piece, file in changed(then_inputs, inputs):
        if is_function(piece):
            text = (
                f"resume: the source of {piece} ({name}) has changed since the run began; it goes on with the new one"
            )
            warnings.warn(text, stacklevel=3)
        else:
            found.setdefault(f"{name}: {piece}", []).extend([] if os.path.isfile(piece) else [file])
    return [f"{text} ({', '.join(files)})" if files else text for text, files in found.items()]


def _refusal(differing: list[str], edited: list[str], output: Path) -> str:
    """Why a run is not resumed, and what to do."""
    reasons, ways = [], []
    if differing:
        reasons.append("; ".join(differing))
        ways.append("give the same" if len(differing) == 1 else f"give those of {output / CONFIG}")
    if edited:
        reasons.append(f"{', '.join(edited)} {'has' if len(edited) == 1 else 'have'} changed since the run began")
        ways.append("restore it" if len(edited) == 1 else "restore them")
    return f"resume: {'; '.join(reasons)}; {' and '.join(ways)}, or --overwrite to start anew"


def check_stage_unchanged(config: Any) -> None:
    """Raises ValueError unless the run in the output folder, if there is one, has these settings: of a run that is part
    of a job, which reads what it left."""
    text = read(Path(config.output) / CONFIG)
    if text is not None and (saved := settings_in(text)) is not None:
        check_same(config, saved)


def read(path: Path) -> str | None:
    """The text of a file; None for one that is missing or no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def settings_in(text: str | None) -> dict[str, Any] | None:
    """The settings in config.yaml; None if it is damaged."""
    try:
        values = yaml.safe_load(text or "")
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and all(isinstance(name, str) for name in values) else None


def _saved_inputs(output: Path) -> Any:
    """The fingerprints of what the run reads, from its folder or else from its newest checkpoint that has them."""
    copies = [config.with_name(INPUTS) for config in settings_of_checkpoints(output)]
    for path in (output / INPUTS, *copies):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    if (output / INPUTS).exists():  # a run of before there were such has none
        text = f"resume: {output / INPUTS} is damaged: whether models and files are the same is not known"
        warnings.warn(text, stacklevel=2)
    return {}


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
