"""Processes that are forked from one in which everything is imported, and killed; what they left, compared."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastrlhf.cli.main as command_line

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}
RELATIVE = {"os.remove", "os.rmdir"}  # shutil.rmtree names files within an open folder
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# says when and where something ran, not what came out; states are not the same bytes twice
NOT_COMPARED = {
    ".lock",
    "timing.jsonl",
    "config.yaml",
    "report.html",
    "inputs.json",
    "steps.json",
    "products.json",
    "state.pt",
    "checksums.json",
    "rows.crc32",
}
LONGEST = 120.0  # seconds of a command
GRACE = 3.0  # seconds that the other processes of a run have to end by themselves, and then after SIGTERM


class HungError(Exception):
    """A command was not done in time."""


@dataclass
class Process:
    """A command that was started, of one process or of those that torchrun would start. ended: the exit status of the
    first that failed, negative for a signal, once `wait` was called"""

    pids: list[int]
    log: Path
    ended: int | None = None
    statuses: dict[int, int] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        return self.pids[0]

    def wait(self) -> int:
        """The exit status. When one of several processes fails, the others are ended, as torchrun does."""
        until, failed = time.monotonic() + LONGEST, None
        while len(self.statuses) < len(self.pids):
            for pid in self.pids:
                self._reap(pid)
            now = time.monotonic()
            if self.ended is not None and self.ended != 0 and failed is None:
                failed = now
            if failed is not None and now > failed + GRACE:
                self.signal(signal.SIGKILL if now > failed + 2 * GRACE else signal.SIGTERM)
            if now > until:
                self.kill()
                for pid in set(self.pids) - set(self.statuses):
                    os.waitpid(pid, 0)
                raise HungError(f"not done after {LONGEST:.0f} seconds: {self.said[-300:]}")
            time.sleep(0.002)
        assert self.ended is not None
        return self.ended

    def _reap(self, pid: int) -> None:
        if pid in self.statuses:
            return
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            self.statuses[pid] = os.waitstatus_to_exitcode(status)
            self.ended = self.ended or self.statuses[pid]

    def signal(self, number: int) -> None:
        for pid in self.pids:
            if pid not in self.statuses:
                os.kill(pid, number)

    def kill(self, pids: list[int] | None = None) -> None:
        """SIGKILL to all of its processes, or to these."""
        for pid in pids or self.pids:
            if pid not in self.statuses:
                os.kill(pid, signal.SIGKILL)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def errors(self) -> list[str]:
        """The lines that begin its messages; the other ranks of a run say that the first one's tells why."""
        lines = [line for line in self.said.splitlines() if re.match(r"fastrlhf[ \w-]*: error: .", line)]
        return [line for line in lines if "another process of the run has ended; its message says why" not in line]

    @property
    def noted(self) -> dict[str, Any]:
        """num: events on files of the output folder; first, last: when it wrote something there (None: it did not)"""
        path = self.log.with_suffix(".json")
        return json.loads(path.read_text()) if path.exists() else {"num": 0, "first": None, "last": None}


def start(
    arguments: list[str],
    out: Path | None,
    log: Path,
    *,
    kill_at: int | None = None,
    linger: float = 0.0,
    delay: float = 0.0,
    ranks: int = 1,
) -> Process:
    """Forks a process that runs a command line, or as many as torchrun would.

    kill_at: the first one kills itself before so manieth event; linger: so many seconds after that; delay: seconds"""
    sys.stdout.flush()
    sys.stderr.flush()
    log.unlink(missing_ok=True)
    log.with_suffix(".json").unlink(missing_ok=True)
    port = _free_port() if ranks > 1 else 0
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.environ.update(_as_torchrun(rank, ranks, port))
                status = _child(arguments, out, log, kill_at if rank == 0 else None, linger, delay, rank)
            finally:
                os._exit(status)
        pids.append(pid)
    return Process(pids, log)


def _child(
    arguments: list[str], out: Path | None, log: Path, kill_at: int | None, linger: float, delay: float, rank: int
) -> int:
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["fastrlhf", *arguments]
        time.sleep(delay)
        noted = _watch(str(out), kill_at, linger)
        status = command_line.main([*arguments, *([f"--output={out}"] if out else [])])
        if rank == 0:
            log.with_suffix(".json").write_text(json.dumps(noted))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def _as_torchrun(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment variables by which torchrun tells a process of its place."""
    if ranks == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "faults"}
    return {name: str(value) for name, value in {**numbers, **address}.items()}


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def _watch(out: str, kill_at: int | None, linger: float) -> dict[str, Any]:
    """Notes this process's changes of files in a folder from now on; fsync, which Python does not tell of, too."""
    noted: dict[str, Any] = {"num": 0, "first": None, "last": None}

    def count() -> None:
        noted["num"] += 1
        if noted["num"] == kill_at:
            if linger:
                threading.Timer(linger, os.kill, (os.getpid(), signal.SIGKILL)).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event not in EVENTS:
            return
        if event == "open" and not (isinstance(values[2], int) and values[2] & WRITES):
            return
        paths = [os.fspath(value) for value in values if isinstance(value, str | os.PathLike)]
        inside = any(path.startswith(out) for path in paths if isinstance(path, str))
        if not inside and not (event in RELATIVE and "/" not in paths[0]):
            return
        count()
        if not paths[0].endswith(("/.lock", out)):  # taking the lock is no writing
            noted["first"] = noted["first"] or time.monotonic()
            noted["last"] = time.monotonic()

    fsync = os.fsync

    def counted_fsync(file: Any) -> None:
        count()
        fsync(file)

    os.fsync = counted_fsync
    sys.addaudithook(hook)
    return noted


def snapshot(out: Path) -> dict[str, str]:
    """A checksum of each file of a run that says what came out of it."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name not in NOT_COMPARED and "tensorboard" not in path.parts:
            found[path.relative_to(out).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """In which files two snapshots differ, and how."""
    words = []
    for name in sorted({**expected, **found}):
        if expected.get(name) != found.get(name):
            words.append(
                f"{name} {'is missing' if name not in found else 'is new' if name not in expected else 'differs'}"
            )
    return words


def refusal(process: Process) -> str | None:
    """Why a process was refused, if in one line: "in use" by a process that it names, or "not empty"; else None."""
    lines = process.errors
    if process.ended not in (1, 2) or "Traceback" in process.said or len(lines) != 1:
        return None
    return next((why for why in ("in use", "not empty") if why in lines[0]), None)
