"""Files of JSON lines that a run adds to: written, read, and cut back to what is whole."""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastrlhf.errors import UserError
from fastrlhf.runtime.atomic_io import append_text, write_file

SEAL = ', "crc32": '


def append(path: Path, row: dict[str, Any], *, seal: bool = False) -> None:
    """Adds a line of JSON; a number that is not finite becomes null, which every reader takes. seal: `with_checksum`"""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    text = json.dumps(clean, allow_nan=False)
    append_text(path, (with_checksum(text) if seal else text) + "\n")


def as_json(row: Any) -> str:
    """A value as a line of JSON, with its letters as they are; lone surrogates, which no file can hold, as escapes."""
    text = json.dumps(row, ensure_ascii=False)
    return text if all(not "\ud800" <= each <= "\udfff" for each in text) else json.dumps(row)


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Writes a file of rows, or replaces it, as `write_file` does."""
    write_file(path, (f"{as_json(row)}\n".encode() for row in rows))


def with_checksum(text: str) -> str:
    """A JSON object with its checksum as the last value, by which `whole_lines` knows that it is what was written."""
    return f"{text[:-1]}{SEAL}{zlib.crc32(text.encode())}}}"


def truncate_after_step(path: Path, step: int) -> None:
    """Removes lines after `step`, and those that are not whole, leaving the earlier ones byte for byte."""
    if path.exists():
        write_file(path, b"".join(line for line in whole_lines(path, "step") if json.loads(line)["step"] <= step))


def whole_lines(path: Path, *names: str) -> list[bytes]:
    """The lines of a file of JSON objects, up to the first that is damaged or lacks one of the names: a warning says
    which. A last line that is half written, as a kill leaves one, is left out without a warning."""
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    has_seals = any(SEAL.encode() in line for line in lines)
    for number, line in enumerate(lines):
        try:
            damaged = any(name not in dict(json.loads(line)) for name in names) or is_broken(line, has_seals)
        except (ValueError, TypeError, RecursionError):
            damaged = True
        if damaged:
            text = f"{path}, line {number + 1}: damaged, so it and the lines after it are left out"
            warnings.warn(text, stacklevel=2)
            return lines[:number]
    return lines


def is_broken(line: bytes, must: bool = False) -> bool:
    """Whether a line is not what was written; must: without a checksum it is broken, too"""
    text, seal, checksum = line.rstrip().rpartition(SEAL.encode())
    return checksum != b"%d}" % zlib.crc32(text + b"}") if seal else must


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file that a run wrote. Raises: ValueError naming the file and the line that is no JSON object."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: damaged, it is no JSON object ({error})") from None
    return rows


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))
