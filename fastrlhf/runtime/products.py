"""What a run has finished, with fingerprints, by which a resumed run notices what was damaged or changed since.

<output>/products.json    by name, what was made, and the fingerprints of its files (see fingerprints.py)
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastrlhf.errors import UserError
from fastrlhf.runtime.atomic_io import write_file
from fastrlhf.runtime.fingerprints import fingerprint_file
from fastrlhf.runtime.jsonl import is_broken, with_checksum

PRODUCTS = "products.json"
# says how and when a loop ran, or is read by its own run alone
NOT_NOTED = {".lock", "config.yaml", "inputs.json", "steps.json", "timing.jsonl", "rows.crc32", PRODUCTS}


def record(output: Path, name: str, product: str | None = None) -> None:
    """Notes that <output>/name, a folder or file, is whole. product: what to delete to have it made again, or it all"""
    files = {file: fingerprint_file(path) for file, path in _files_of(output / name).items()}
    _write(output, {**recorded(output), name: {"product": product or name, "files": files}})


def note_new(output: Path, name: str, product: str | None = None) -> None:
    """`record` of what is not noted yet: a kill may have come between its making and that."""
    if name not in recorded(output):
        record(output, name, product)


def forget(output: Path, name: str) -> None:
    """Notes that something is about to be made anew."""
    left = recorded(output)
    if left.pop(name, None) is not None:
        _write(output, left)


def recorded(output: Path) -> dict[str, Any]:
    """What was noted; nothing if that is damaged."""
    try:
        text = (output / PRODUCTS).read_bytes()
        found = {} if is_broken(text) else json.loads(text)
        return {
            name: {"product": str(each["product"]), "files": dict(each["files"])}
            for name, each in found.items()
            if name != "crc32"
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def check_products(output: Path, *, leave_out: Collection[str] = ()) -> None:
    """Raises ValueError when a file of what was finished is missing or has changed since; what is gone as a whole is
    made again. leave_out: names of what nobody needs any longer"""
    for name, each in recorded(output).items():
        product = output / each["product"]
        if name in leave_out or not os.path.lexists(product):
            continue
        there = _files_of(output / name)
        for file, before in each["files"].items():
            if file not in there or fingerprint_file(there[file]) != before:
                what = "has changed since it was written" if file in there else "is missing"
                end = "to go on without it" if name == "best" else "to have it made again"
                raise UserError(f"resume: {output / name / file} {what}; restore it, or delete {product} {end}")


def _write(output: Path, found: dict[str, Any]) -> None:
    if found:
        write_file(output / PRODUCTS, f"{with_checksum(json.dumps(found))}\n".encode())
    else:
        (output / PRODUCTS).unlink(missing_ok=True)


def _files_of(path: Path) -> dict[str, Path]:
    """The files of a folder by their place in it, or a single file; not those of loops that are in the making."""
    if path.is_file():
        return {"": path}
    found = {each.relative_to(path): each for each in sorted(path.rglob("*")) if each.is_file()}
    left_out = {"checkpoints", "tensorboard"}
    return {str(at): each for at, each in found.items() if at.name not in NOT_NOTED and not left_out & {*at.parts}}
