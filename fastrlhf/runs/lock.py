"""A lock on an output folder: one process writes there at a time, and the lock ends with the process, however it ends.

The system holds the lock (flock) on the file `.lock` in the folder, which names the process for whoever comes second.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

LOCK = ".lock"


class FolderInUseError(FileExistsError):
    """Another process writes into the folder."""


class _Held:
    """A folder that this process holds, as long as a Lock refers to it. owner: the one that may write."""

    def __init__(self, folder: Path) -> None:
        self.made = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
        folder.mkdir(parents=True, exist_ok=True)
        self.file = _take(folder / LOCK)
        self.owner: weakref.ref[Lock] | None = None
        weakref.finalize(self, _release, self.file, folder / LOCK, self.made, os.getpid())


_HELD: weakref.WeakValueDictionary[Path, _Held] = weakref.WeakValueDictionary()


class Lock:
    """Holds a folder for this process, from now until `release`; makes the folder if it is not there.

    Several locks of a process may hold the same folder, as when a cell of a notebook runs again: the one that was
    claimed last may write, and `check` of the others raises.

    Raises: FolderInUseError, naming the process that holds the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.held: _Held | None = _HELD.get(self.folder) or _Held(self.folder)
        _HELD[self.folder] = self.held
        self.has_claimed = False
        if self.held.owner is None:
            self.claim()

    def claim(self) -> None:
        """From now on this lock is the one of the process that may write in the folder. Raises: as check, once another
        one has claimed it since."""
        if self.held is None or self.has_claimed:
            self.check()
        else:
            self.held.owner, self.has_claimed = weakref.ref(self), True

    def check(self) -> None:
        """Raises RuntimeError when this process has begun another run in the folder, or the lock was released."""
        if self.held is None or self.held.owner is None or self.held.owner() is not self:
            raise RuntimeError(f"output: {self.folder} is no longer held by this run: it was closed, or begun anew")

    def release(self) -> None:
        """Lets others have the folder; removes it if nothing was written there."""
        if self.held is not None and self.held.owner is not None and self.held.owner() is self:
            self.held.owner = None
        self.held = None


def check_free_below(folder: Path) -> None:
    """Raises FolderInUseError when another process holds the folder or one under it."""
    for path in [folder / LOCK, *folder.rglob(LOCK)] if folder.is_dir() and not folder.is_symlink() else []:
        if path.is_file() and path.parent.resolve() not in _HELD:
            _take(path).close()


def _take(path: Path) -> IO[str]:
    """The lock file, open and locked."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it stays open as long as the lock is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            raise FolderInUseError(
                f"output: {path.parent} is in use by {holder}; wait until it has ended, stop it, or give another output"
            ) from None
        except OSError as error:
            warnings.warn(
                f"output: the file system of {path.parent} has no locks ({error.strerror}): start no second process "
                "on this folder",
                stacklevel=4,
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # whoever held it has deleted it in the meantime
    file.truncate(0)
    command = " ".join(["fastrlhf" if sys.argv[0].endswith("__main__.py") else Path(sys.argv[0]).name, *sys.argv[1:4]])
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": time.time()}
    file.write(json.dumps(mine) + "\n")
    file.flush()
    return file


def _holder(file: IO[str]) -> str:
    """The process that holds a lock file, as text."""
    try:
        file.seek(0)
        holder: dict[str, Any] = json.loads(file.read())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        host = "" if holder["host"] == socket.gethostname() else f" on {holder['host']}"
        return f"process {holder['pid']}{host} ({holder['command']}, since {since})"
    except (ValueError, KeyError, TypeError, OSError):  # it has not written its name yet
        return "another process"


def _release(file: IO[str], path: Path, made: list[Path], pid: int) -> None:
    if os.getpid() == pid and not file.closed:
        with suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                path.unlink()  # while it is still locked
        for folder in made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
    file.close()


def _forget() -> None:
    """A fork of the process would keep its locks alive."""
    for held in list(_HELD.values()):
        held.file.close()
    _HELD.clear()


os.register_at_fork(after_in_child=_forget)
