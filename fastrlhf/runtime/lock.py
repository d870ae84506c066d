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

from fastrlhf.errors import MachineError, MissingFileError, OutputError

LOCK = ".lock"


class FolderInUseError(OutputError):
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

    Raises: FolderInUseError, naming the process that holds the folder; FileNotFoundError for a link to nowhere."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pid = folder.resolve(), os.getpid()
        try:
            self.held: _Held | None = _HELD.get(self.folder) or _Held(self.folder)
        except FileNotFoundError:
            raise MissingFileError(
                f"output: {folder} leads to {self.folder}, which cannot be made; delete it, or give another"
            ) from None
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
        if self.held is None or self.held.owner is None or self.held.owner() is not self or self.pid != os.getpid():
            raise MachineError(f"output: {self.folder} is no longer held by this run: it was closed, or begun anew")
        if not _is_same(self.held.file, self.folder / LOCK):
            raise MachineError(f"output: {self.folder / LOCK} was deleted while the run went on, so it stops here")

    def release(self) -> None:
        """Lets others have the folder; removes it if nothing was written there."""
        if self.held is not None and self.held.owner is not None and self.held.owner() is self:
            self.held.owner = None
        self.held = None


def check_free_above(folder: Path) -> None:
    """Raises FolderInUseError when another process holds a folder that this one is in, as that of a job."""
    for parent in folder.resolve().parents:
        _check_free(parent / LOCK)


def check_free_below(folder: Path) -> None:
    """Raises FolderInUseError when another process holds the folder or one under it."""
    for path in [folder / LOCK, *folder.rglob(LOCK)] if folder.is_dir() and not folder.is_symlink() else []:
        _check_free(path.resolve())


def _check_free(path: Path) -> None:
    if path.parent in _HELD or not path.is_file():
        return
    with suppress(PermissionError), open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(path, file) from None
        except OSError:  # a file system without locks
            return


def _take(path: Path) -> IO[str]:
    """The lock file, open and locked."""
    while True:
        if path.is_symlink():
            raise OutputError(f"output: {path} is a link, and no lock of ours; give another output")
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it stays open as long as the lock is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            error = _in_use(path, file)
            file.close()
            raise error from None
        except OSError as error:
            warnings.warn(
                f"output: the file system of {path.parent} has no locks ({error.strerror}): start no second process "
                "on this folder",
                stacklevel=4,
            )
        if _is_same(file, path):
            break
        file.close()  # whoever held it has deleted it in the meantime
    if _read(file) is None:
        file.close()
        raise OutputError(f"output: {path} is no lock of ours; give another output")
    file.truncate(0)
    command = " ".join(["fastrlhf" if sys.argv[0].endswith("__main__.py") else Path(sys.argv[0]).name, *sys.argv[1:4]])
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": time.time()}
    file.write(json.dumps(mine) + "\n")
    file.flush()
    return file


def _is_same(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one under its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (OSError, ValueError):
        return False


def _read(file: IO[str]) -> dict[str, Any] | None:
    """What a lock file says of its process, nothing if that has not written its name yet; None: it is none of ours."""
    try:
        file.seek(0)
        holder = json.loads(file.read() or "{}")
        return holder if not holder or {"pid", "host", "command", "since"} <= holder.keys() else None
    except (ValueError, AttributeError, OSError, RecursionError):
        return None


def _locker(file: IO[str]) -> int | None:
    """The process that the system says holds the lock; None where it does not say."""
    try:
        inode = f":{os.fstat(file.fileno()).st_ino} "
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines() if inode in line]
        return next(
            (int(line[4]) for line in lines if line[1] == "FLOCK" and line[3] == "WRITE" and line[4] != "0"), None
        )
    except (OSError, ValueError, IndexError):
        return None


def _in_use(path: Path, file: IO[str]) -> FolderInUseError:
    """The error that names the process that holds a lock file, which writes its name there after it has locked it."""
    pid, until = _locker(file), time.monotonic() + 1
    holder = _read(file)
    while time.monotonic() < until and (not holder or (pid is not None and holder["pid"] != pid)):
        time.sleep(0.01)
        pid, holder = _locker(file), _read(file)
    who = "another process" if pid is None else f"process {pid}"
    if holder and pid in (None, holder["pid"]):
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        host = "" if holder["host"] == socket.gethostname() else f" on {holder['host']}"
        who = f"process {holder['pid']}{host} ({holder['command']}, since {since})"
    return FolderInUseError(
        f"output: {path.parent} is in use by {who}; wait until it has ended, stop it, or give another output"
    )


def _release(file: IO[str], path: Path, made: list[Path], pid: int) -> None:
    if os.getpid() == pid and not file.closed:
        with suppress(OSError):
            if _is_same(file, path):
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
