"""Calls a function of many items in threads, at most so many calls at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from fastrlhf.runtime import signals

Item = TypeVar("Item")
Result = TypeVar("Result")


def concurrently(
    function: Callable[[Item], Result], items: Sequence[Item], limit: int
) -> Generator[tuple[int, Item, Result], None, None]:
    """Calls the function for each item, at most `limit` calls at a time; yields (number, item, result) as calls end.

    The first error is raised, and no further call begins. An interrupt ends it at once: threads that still wait for a
    server do not keep the process alive. Who leaves it early closes it (contextlib.closing), or calls go on."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, function(items[number]), None))
            except BaseException as error:  # it belongs to the thread that waits
                done.put((number, None, error))

    for number in range(len(items)):
        waiting.put(number)
    for _ in range(min(limit, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            with signals.waiting_for_a_server():
                number, result, error = done.get()
            if error is not None:
                try:
                    raise error
                finally:
                    error = None  # a cycle would keep what the caller holds
            yield number, items[number], result
    finally:
        stopped.set()
