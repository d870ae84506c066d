"""When a checkpoint is due by the time, and how large one is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from torch import Tensor

MAX_SHARE = 0.05  # of a run's time that is spent on checkpoints, before another one is due by the clock
WRITE_SPEED = 1e8  # bytes a second of the first checkpoint, as a cautious guess


class CheckpointClock:
    """Says when a checkpoint is due by the time, so that no more than `minutes` of work are lost; 0: never.

    It waits longer where all checkpoints of the process so far, and another one as long as the last, would take more
    than MAX_SHARE of its time. How long the first one takes is estimated from its bytes."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.begun = self.last = time.monotonic()
        self.seconds = 0.0
        self.seconds_of_last: float | None = None

    def is_due(self, num_bytes: Callable[[], int]) -> bool:
        """Whether it is time for a checkpoint; num_bytes: says how many bytes one takes."""
        now = time.monotonic()
        if not self.minutes or now - self.last < 60 * self.minutes:
            return False
        next_one = num_bytes() / WRITE_SPEED if self.seconds_of_last is None else self.seconds_of_last
        return self.seconds + next_one <= MAX_SHARE * (now - self.begun)

    def saved(self, seconds: float) -> None:
        """Takes note of a checkpoint, and of how long it took."""
        self.last = time.monotonic()
        self.seconds, self.seconds_of_last = self.seconds + seconds, seconds


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """How many bytes tensors take; of sharded ones, all shards together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
