"""SIGINT and SIGTERM: a loop that runs ends its step and leaves a checkpoint, and everything else stops at once.

So does a loop that waits for a server before its step has changed anything: the server may never answer.

Only the command line handles signals. In a program or a notebook they do what they do there, and nothing here acts.

A terminal sends Ctrl-C to the children of a command too, whose work the step may need, such as a pool of a reward
function. Forks ignore it while the command handles signals; SIGTERM ends them as ever. Programs that it starts end.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from fastrlhf.runtime import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEATED = 3.0  # seconds in which torchrun passes on to each process a signal that the terminal has sent it already
MESSAGE = "interrupted: finishing the step, then a checkpoint; again to stop at once\n"

_owner = 0  # the process whose signals are handled
_loops: weakref.WeakSet[Any] = weakref.WeakSet()  # those that run
_waiting = 0  # how many waits for a server there are, one inside the other
_pending: tuple[int, float] | None = None  # the signal that waits for the end of a step, and when it came


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to stop. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def handled() -> Iterator[None]:
    """Handles SIGINT and SIGTERM as this module says, until the context exits. An ignored signal, as under nohup, stays
    ignored; outside the main thread, where Python allows no handlers, nothing is done."""
    global _owner, _pending
    _owner, _pending, before = os.getpid(), None, {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _handle)
    try:
        yield
    finally:
        _pending = None
        for number, handler in before.items():
            signal.signal(number, handler)


def defer_signals_for(loop: Any) -> None:
    """From now on signals wait for the end of a step of this loop."""
    _loops.add(loop)


def no_longer_defer_for(loop: Any) -> None:
    """Signals no longer wait for this loop."""
    _loops.discard(loop)


@contextmanager
def waiting_for_a_server() -> Iterator[None]:
    """Within it a signal ends the command at once, unless a loop has begun an update, or several processes train, of
    which the others may not be waiting."""
    global _waiting
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _waiting += 1
    try:
        if _pending is not None and _ends_at_once():
            raise Interrupted(_pending[0])
        yield
    finally:
        _waiting -= 1


def _ends_at_once() -> bool:
    return (
        _waiting > 0 and distributed.world_size() == 1 and not any(getattr(loop, "is_in_step", True) for loop in _loops)
    )


def pending() -> int:
    """The signal that waits for the end of a step, 0 if there is none."""
    return 0 if _pending is None else _pending[0]


def stop_if_asked() -> None:
    """Raises Interrupted if a signal came while a loop ran that has ended since."""
    if _pending is not None:
        raise Interrupted(_pending[0])


def _set_in_fork() -> None:
    if signal.getsignal(signal.SIGINT) is _handle:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if signal.getsignal(signal.SIGTERM) is _handle:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _handle(number: int, frame: FrameType | None) -> None:
    global _pending
    if os.getpid() != _owner:  # a fork in which _set_in_fork has yet to run
        if number == signal.SIGTERM:  # by which a pool ends its workers
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    first, _pending = _pending, _pending or (number, time.monotonic())
    if _loops and first is None and not _ends_at_once():
        if distributed.is_main_process():
            with suppress(OSError):  # nobody may be there to read it
                os.write(2, MESSAGE.encode())  # print could be what was interrupted
        return
    if _loops and first is not None and distributed.world_size() > 1 and time.monotonic() - first[1] < REPEATED:
        return
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)  # whatever hangs while the command ends, the next one ends the process
    raise Interrupted(number)


os.register_at_fork(after_in_child=_set_in_fork)
