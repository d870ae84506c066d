"""What a command prints: foreign texts that cannot steer a terminal, warnings as lines, pipes that nobody reads."""

from __future__ import annotations

import os
import select
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import fastrlhf


def printable(text: object) -> str:
    """The text with every character that a terminal obeys or hides in the place of showing it as an escape: ESC and the
    other controls but line ends and tabs, marks of direction, characters without width, separators, lone surrogates.

    All that we print and do not write ourselves comes from files, models and servers: names of columns, roles and
    files, errors of templates, answers."""
    return "".join(each if _is_shown(each) else each.encode("unicode_escape").decode() for each in str(text))


def print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's sys.excepthook for a command: the traceback of a mistake of ours may hold foreign texts as well."""
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))


def _is_shown(character: str) -> bool:
    return character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs"  # spaces


def closed_pipes() -> list[int]:
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
            return printable(f"warning: {message}\n")
        return printable(usual(message, category, filename, *place, **line))

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = usual
