"""Files of JSON lines that a run adds to: written, read, and cut back to what is whole."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

from fastrlhf.runs.whole import append_text, write_file


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a line of JSON; a number that is not finite becomes null, which every reader takes."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    append_text(path, json.dumps(clean, allow_nan=False) + "\n")


def cut_back(path: Path, step: int) -> None:
    """Removes lines after `step`, and those that are not whole, leaving the earlier ones byte for byte."""
    if path.exists():
        write_file(path, b"".join(line for line in whole_lines(path, "step") if json.loads(line)["step"] <= step))


def whole_lines(path: Path, *names: str) -> list[bytes]:
    """The lines of a file of JSON objects, up to the first that is damaged or lacks one of the names: a warning says
    which. A last line that is half written, as a kill leaves one, is left out without a warning."""
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    for number, line in enumerate(lines):
        try:
            damaged = any(name not in dict(json.loads(line)) for name in names)
        except (ValueError, TypeError):
            damaged = True
        if damaged:
            text = f"{path}, line {number + 1}: damaged, so it and the lines after it are left out"
            warnings.warn(text, stacklevel=2)
            return lines[:number]
    return lines


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file that a run wrote. Raises: ValueError naming the file and the line that is no JSON object."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: damaged, it is no JSON object ({error})") from None
    return rows
