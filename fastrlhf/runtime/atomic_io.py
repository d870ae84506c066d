"""Files and folders that are whole or not there, whenever a run is killed, and by whose checksums damage is found."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastrlhf.errors import DiskFullError
from fastrlhf.runtime import distributed

CHECKSUMS = "checksums.json"
REPLACED = ".replaced.partial"  # behind the name of a folder whose successor is about to get that name


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes a folder that write(folder) fills; a kill at any moment leaves no half of it under its name.

    All processes of a run call write, which may need them all; in the first one alone it may leave files. A link to an
    empty folder is followed; another link is replaced, and what it leads to left alone.

    Raises: DiskFullError naming the disk, and whatever write raises; nothing is left of the folder then."""
    if not distributed.is_main_process():
        write(folder)
        return
    if folder.is_symlink() and folder.is_dir() and not any(folder.iterdir()):
        folder = folder.resolve()
    partial = folder.with_name(folder.name + ".partial")
    recover(folder)
    with _removed_on_error(partial), _naming_full_disk(folder):
        discard(partial)
        partial.mkdir(parents=True)
        write(partial)
        os.umask(umask := os.umask(0))
        for path in (*partial.rglob("*"), partial):
            if path.is_file():
                path.chmod(0o666 & ~umask)  # safetensors lets only the owner read
            flush(path)
    aside = folder.with_name(folder.name + REPLACED)
    if os.path.lexists(folder):
        discard(aside)
        os.rename(folder, aside)  # a kill here: recover
    os.rename(partial, folder)
    for parent in (folder.parent, folder.parent.parent):  # the parent may be new too
        flush(parent)
    discard(aside)


def recover(folder: Path) -> None:
    """Gives a folder its name back if a kill came while `write_whole` replaced it."""
    aside = folder.with_name(folder.name + REPLACED)
    if os.path.lexists(aside) and not os.path.lexists(folder):
        os.rename(aside, folder)


def write_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Writes a file, or replaces it; a kill at any moment, or an error in making the data, leaves the old one or the
    new one. Raises: DiskFullError naming the disk."""
    partial = path.with_name(path.name + ".partial")
    with _removed_on_error(partial), _naming_full_disk(path):
        if partial.is_dir():
            discard(partial)
        with partial.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
        flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def append_text(path: Path, text: str) -> None:
    """Adds lines to a file. Raises: DiskFullError naming the disk."""
    with _naming_full_disk(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def _removed_on_error(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OSError):
            discard(partial)
        raise


@contextmanager
def _naming_full_disk(path: Path) -> Iterator[None]:
    """Says of an error that the disk is full, where it is: torch and safetensors say it in words of their own."""
    try:
        yield
    except Exception as error:
        free, total = _room(path.parent)
        words = str(error).lower()
        known = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not (known or "no space left" in words or "os error 28" in words or free < 2**16):
            raise
        quota = ": a quota, or a limit of file sizes" if free >= 2**20 else ""
        raise DiskFullError(
            f"no space left for {path}: {free / 2**20:,.1f} of {total / 2**20:,.1f} MiB of its disk are free{quota}; "
            "make room, then go on"
        ) from error


def _room(folder: Path) -> tuple[float, float]:
    """Free bytes, and bytes of the whole disk that a folder is on."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        usage = shutil.disk_usage(there)
        return usage.free, usage.total
    except (OSError, StopIteration):
        return float("inf"), float("inf")


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
    """Says how a checkpoint differs from its checksums; None if it does not."""
    try:
        text = (folder / CHECKSUMS).read_text(encoding="utf-8") if (folder / CHECKSUMS).is_file() else ""
        expected = json.loads(text)
    except (OSError, ValueError, RecursionError):
        expected = None
    if not isinstance(expected, dict):
        return f"no readable {CHECKSUMS}"
    found = checksums(folder)
    different = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if not different:
        return None
    name = different[0]
    what = "is missing" if name not in found else "was added" if name not in expected else "has other contents"
    return f"{name} {what}"


def remove(path: Path) -> None:
    """Deletes a file or folder, if there is one. Once this has begun, a folder is no longer found under its name.

    A link is deleted, its target is kept. If the link is named checkpoints, the step-* folders in its target are
    deleted and the link is kept."""
    if path.is_symlink() and path.name == "checkpoints" and path.is_dir():
        for inside in path.glob("step-*"):
            remove(inside)
        return
    partial = path.with_name(path.name + ".deleted.partial")
    discard(partial)  # of an earlier kill
    if path.is_dir() and not path.is_symlink():
        os.rename(path, partial)
        shutil.rmtree(partial)
    else:
        discard(path)


def discard(path: Path) -> None:
    """Deletes what is under a name: a file, a link, or a folder with all that is in it; a kill may leave a part."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Returns when what was written to a file, or into a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
