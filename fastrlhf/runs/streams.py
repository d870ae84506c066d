"""What a command prints: warnings as lines, and pipes that nobody reads any longer."""

from __future__ import annotations

import os
import select
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fastrlhf


def unread() -> list[int]:
    """The file numbers of stdout and stderr, of those that are a pipe whose reader is gone."""
    found = []
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # it is None, closed, or none of the system's
            number, poll = stream.fileno(), select.poll()
            poll.register(number, 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                found.append(number)
    return found


def mute(numbers: Iterable[int]) -> None:
    """Drops what is still written to these files: Python flushes its streams when it ends, and would fail."""
    for number in numbers:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Our warnings are a line each, without the place in our files that Python puts around them."""
    usual, ours = warnings.formatwarning, Path(fastrlhf.__file__).parent

    def one_line(message: Warning | str, category: type[Warning], filename: str, *place: Any, **line: Any) -> str:
        if category is UserWarning and Path(filename).is_relative_to(ours):
            return f"warning: {message}\n"
        return usual(message, category, filename, *place, **line)

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = usual
