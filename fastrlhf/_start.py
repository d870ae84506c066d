"""Ctrl-C while the command line still imports torch: the process ends at once, with status 130 and without a traceback.

The package imports this first. It does nothing in a program that merely imports the package."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType


def is_command(argv: Sequence[str], orig_argv: Sequence[str]) -> bool:
    """Whether these are the arguments of `fastrlhf ...` or, while Python looks for the module, `python -m fastrlhf`."""
    if list(argv[:1]) == ["-m"]:
        own = orig_argv[: len(orig_argv) - len(argv) + 1]  # without what follows the name of the module
        return list(own[-2:]) == ["-m", "fastrlhf"] or own[-1] == "-mfastrlhf"
    return bool(argv) and os.path.basename(argv[0]) in ("fastrlhf", "fastrlhf.exe")


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"fastrlhf: interrupted\n")
    os._exit(128 + number)


if is_command(sys.argv, sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)
