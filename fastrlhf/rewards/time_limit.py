"""A time limit for reward functions, which run where they always did: in the thread that scores.

A function may hang anywhere, so there are three clocks. A thread sees that time is up and sends the calling thread a
signal, whose handler raises in the function: that ends Python code, sleeping, and waiting for sockets, locks and
programs. Where the function keeps Python's global lock, as a regular expression does, that thread cannot run; an alarm
of the system raises in its place, unless the program uses alarms itself. What neither interrupts ends the process:
by the thread, or, where that cannot run, by faulthandler, which needs no lock.
"""

from __future__ import annotations

import faulthandler
import functools
import inspect
import linecache
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from fastrlhf.errors import UserFunctionTimeout

T = TypeVar("T")
GRACE = 10.0  # seconds that a function gets to end once it was interrupted
NOTE = 60.0  # seconds after which one note says that a function is slow
HAS_SIGNALS = hasattr(signal, "SIGURG") and hasattr(signal, "setitimer") and hasattr(signal, "pthread_kill")

_noted: set[str] = set()  # the functions that a note was about
_interrupted = False  # whether a function was interrupted: it may have left threads that never end


class _TimeIsUp(BaseException):
    """Raised in a function whose time is up; no Exception, since functions catch those and go on."""


def within_reward_timeout(seconds: float | None, name: str, num_responses: int, call: Callable[[], T]) -> T:
    """Returns what `call` returns. seconds: that it may take; None: without end; name: of what it calls, for errors

    Raises: TimeoutError once it has taken longer, naming the line where it was; what it raises itself."""
    if seconds is None:
        return call()
    clock = _Clock(seconds, f"{name} on {num_responses} responses", call)
    try:
        try:
            clock.start()
            returned = call()
        finally:
            clock.stop()
    except BaseException as error:
        clock.stop()  # again: time may have been up in the middle of the first one
        if not clock.is_up or isinstance(error, KeyboardInterrupt):
            raise
    if clock.is_up:  # a function that catches everything may return all the same: what is no answer
        raise UserFunctionTimeout(f"reward: {clock.message()}") from None
    return returned


def leave_if_interrupted(status: int) -> None:
    """Ends the process if a function that was interrupted left threads for which Python would wait at its end."""
    others = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    if _interrupted and others:
        os._exit(status)


class _Clock:
    """The clocks of one call. is_up: whether its time was up before it ended; where: the line that it was at then"""

    def __init__(self, seconds: float, what: str, call: Callable[[], Any]) -> None:
        self.seconds, self.what, self.file = seconds, what, _file_of(call)
        self.is_up, self.where = False, "an unknown line"
        self.process, self.thread = os.getpid(), threading.get_ident()
        self.ended = threading.Event()
        self.handlers: dict[int, Any] = {}
        self.can_interrupt = HAS_SIGNALS and threading.current_thread() is threading.main_thread()

    def start(self) -> None:
        if self.can_interrupt:
            self.handlers[signal.SIGURG] = signal.signal(signal.SIGURG, self._interrupt)
            if signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and not signal.getitimer(signal.ITIMER_REAL)[0]:
                self.handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._interrupt)
                signal.setitimer(signal.ITIMER_REAL, self.seconds)
        faulthandler.dump_traceback_later(self.seconds + 2 * GRACE, exit=True, file=2)
        threading.Thread(target=self._watch, daemon=True, name="reward_timeout").start()

    def stop(self) -> None:
        """Stops the clocks; signals mean again what they did, but for those whose handler the function has set."""
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()
        for number in list(self.handlers):
            if signal.getsignal(number) == self._interrupt:
                if number == signal.SIGALRM:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(number, self.handlers[number] or signal.SIG_DFL)
            del self.handlers[number]

    def message(self) -> str:
        return (
            f"{self.what} had not returned after {self.seconds:g} s; it was at {self.where}. Mend the function, or "
            f"raise reward_timeout={self.seconds:g} (none: no limit)"
        )

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        global _interrupted
        if os.getpid() == self.process and not self.ended.is_set() and not self.is_up:
            self.is_up = _interrupted = True
            self.where = self._place(frame)
            raise _TimeIsUp

    def _watch(self) -> None:
        left = self.seconds
        if left > NOTE and self.what.partition(" on ")[0] not in _noted:
            if self.ended.wait(NOTE):
                return
            left -= NOTE
            _noted.add(self.what.partition(" on ")[0])
            where = self._place(sys._current_frames().get(self.thread))
            _write(f"note: {self.what} takes more than {NOTE:g} s, now at {where}; reward_timeout={self.seconds:g}")
        if self.ended.wait(left):
            return
        if self.can_interrupt:  # not self.handlers, which `stop` may have emptied since the wait
            signal.pthread_kill(self.thread, signal.SIGURG)
            if self.ended.wait(GRACE):
                return
        self.where = self.where if self.is_up else self._place(sys._current_frames().get(self.thread))
        _write(f"error: reward: {self.message()}. It could not be interrupted, so the process ends")
        os._exit(1)

    def _place(self, frame: FrameType | None) -> str:
        """The innermost line of the function's own file, and the innermost of all where that is another."""
        inside = []
        for step, line in traceback.walk_stack(frame):
            if step.f_code.co_filename == __file__:
                break
            inside.append((step.f_code.co_filename, line, step.f_code.co_name))
        if not inside:
            return "an unknown line"
        file, line, name = next((place for place in inside if place[0] == self.file), inside[0])
        text = f"{file}:{line} in {name}: {linecache.getline(file, line).strip()[:80]}"
        return text if (file, line, name) == inside[0] else f"{text} (in {'{}:{} in {}'.format(*inside[0])})"


def _file_of(function: Any) -> str | None:
    """The file of a function, or of the class of a callable."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return getattr(code, "co_filename", None)


def _write(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # print may wait for the thread that hangs
