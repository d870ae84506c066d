"""Processes that are forked from one in which everything is imported, and killed; what they left, compared."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastrlhf.__main__ as command_line

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
    "state.pt",
    "checksums.json",
    "rows.crc32",
}
LONGEST = 300.0  # seconds of a command


@dataclass
class Process:
    """A command that was started. ended: its exit status, negative for a signal, once `wait` was called"""

    pid: int
    log: Path
    ended: int | None = None

    def wait(self) -> int:
        """The exit status; the process is killed if it takes too long."""
        until = time.monotonic() + LONGEST
        while self.ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.ended = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"{self.log}: not done after {LONGEST:.0f} seconds")
            else:
                time.sleep(0.002)
        return self.ended

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.ended = os.waitstatus_to_exitcode(status)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def noted(self) -> dict[str, Any]:
        """num: events on files of the output folder; first, last: when it wrote something there (None: it did not)"""
        path = self.log.with_suffix(".json")
        return json.loads(path.read_text()) if path.exists() else {"num": 0, "first": None, "last": None}


def start(arguments: list[str], out: Path, log: Path, *, kill_at: int | None = None, delay: float = 0.0) -> Process:
    """Forks a process that runs a command line. kill_at: it kills itself before so manieth event; delay: seconds"""
    sys.stdout.flush()
    sys.stderr.flush()
    log.unlink(missing_ok=True)
    log.with_suffix(".json").unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return Process(pid, log)
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.argv = ["fastrlhf", *arguments]
        time.sleep(delay)
        noted = _watch(str(out), kill_at)
        status = command_line.main([*arguments, f"--output={out}"])
        log.with_suffix(".json").write_text(json.dumps(noted))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch(out: str, kill_at: int | None) -> dict[str, Any]:
    """Notes this process's changes of files in a folder from now on."""
    noted: dict[str, Any] = {"num": 0, "first": None, "last": None}

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event not in EVENTS:
            return
        if event == "open" and not (isinstance(values[2], int) and values[2] & WRITES):
            return
        paths = [os.fspath(value) for value in values if isinstance(value, str | os.PathLike)]
        inside = any(path.startswith(out) for path in paths if isinstance(path, str))
        if not inside and not (event in RELATIVE and "/" not in paths[0]):
            return
        noted["num"] += 1
        if noted["num"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if not paths[0].endswith(("/.lock", out)):  # taking the lock is no writing
            noted["first"] = noted["first"] or time.monotonic()
            noted["last"] = time.monotonic()

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
    lines = [line for line in process.said.splitlines() if ": error: " in line]
    if process.ended not in (1, 2) or "Traceback" in process.said or len(lines) != 1:
        return None
    return next((why for why in ("in use", "not empty") if why in lines[0]), None)
