"""Files and folders that are whole or not there, whenever a run is killed, and by whose checksums damage is found."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastrlhf.runs import ranks

CHECKSUMS = "checksums.json"


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes a folder that write(folder) fills; a kill at any moment leaves no half of it under its name.

    All processes of a run call write, which may need them all; in the first one alone it may leave files."""
    if not ranks.is_first():
        write(folder)
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    os.umask(umask := os.umask(0))
    for path in (*partial.rglob("*"), partial):
        if path.is_file():
            path.chmod(0o666 & ~umask)  # safetensors lets only the owner read
        flush(path)
    remove(folder)
    os.rename(partial, folder)
    for parent in (folder.parent, folder.parent.parent):  # the parent may be new too
        flush(parent)


def write_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Writes a file, or replaces it; a kill at any moment, or an error in making the data, leaves the old one or the
    new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, as `write_file` does; a number that is not finite becomes null, as in metrics.jsonl."""
    write_file(path, (json.dumps(finite(value), indent=2, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """The value with None for every number in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file under a folder, by its path there; not of the file that holds them."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS):
        with open(path, "rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def find_damage(folder: Path) -> str | None:
    """In what the files of a checkpoint are no longer those that were written; None if they are."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"no readable {CHECKSUMS}"
    found = checksums(folder)
    different = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if not different:
        return None
    name = different[0]
    what = "is missing" if name not in found else "was added" if name not in expected else "has other contents"
    return f"{name} {what}"


def remove(path: Path) -> None:
    """Deletes a file or folder, if there is one. Once this has begun, a folder is no longer found under its name."""
    if path.is_file():
        path.unlink()
        return
    partial = path.with_name(path.name + ".deleted.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an earlier kill
    if path.exists():
        os.rename(path, partial)
        shutil.rmtree(partial)


def flush(path: Path) -> None:
    """Returns when what was written to a file, or into a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
