"""A function of many items, of which so many are under way at once, in threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def concurrently(
    function: Callable[[Item], Result], items: Sequence[Item], limit: int
) -> Generator[tuple[int, Item, Result], None, None]:
    """Yields (number, item, result) of a function of each item as they are done, so many under way at once.

    The first error ends it, and so does an interrupt: at once, as threads that still wait for a server do not keep the
    process. Close it (contextlib.closing) when leaving it early, and no further item is begun."""
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
            number, result, error = done.get()
            if error is not None:
                try:
                    raise error
                finally:
                    error = None  # a cycle would keep what the caller holds
            yield number, items[number], result
    finally:
        stopped.set()
