"""The models in an output folder, model/ and best/: each is complete or not there, and its step is known.

<output>/steps.json: by name, after which step each was written, and how many steps are planned
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastrlhf.runtime import distributed, products
from fastrlhf.runtime.atomic_io import write_json, write_whole
from fastrlhf.runtime.output_folder import STEPS


def write_model(output: Path, name: str, step: int, save: Callable[[Path], None]) -> None:
    """Writes <output>/name, which save(folder) fills, then its step, and its files into products.json."""
    forget_model(output, name)
    write_whole(output / name, save)
    note_step(output, name, step)
    if distributed.is_main_process():
        products.record(output, name)


def forget_model(output: Path, name: str) -> None:
    """Takes the step and the files of <output>/name off the records, since the model is about to change."""
    note_step(output, name, None)
    if distributed.is_main_process():
        products.forget(output, name)


def step_of(folder: Path) -> int | None:
    """After which step <output>/model or best was written; None if it is not there, or unknown."""
    step = _noted(folder.parent).get(folder.name)
    return step if isinstance(step, int) and folder.exists() else None


def note_step(output: Path, name: str, step: int | None) -> None:
    """Notes the step of a model (None: no longer known) or of the run's end (`planned`); the first process writes."""
    noted = _noted(output) if distributed.is_main_process() else {}
    if distributed.is_main_process() and noted.get(name) != step:
        write_json(output / STEPS, {**noted, name: step})


def _noted(output: Path) -> dict[str, Any]:
    try:
        found = json.loads((output / STEPS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none was written, or it is damaged
        return {}
    return found if isinstance(found, dict) else {}
