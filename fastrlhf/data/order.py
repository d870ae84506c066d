"""The order in which rows are trained on: a function of the seed and the step, so a resumed run needs only its step."""

from __future__ import annotations

import numpy as np


def shuffled(num: int, *key: int) -> list[int]:
    """Returns 0 ... num - 1 in an order that follows from the key.

    torch's CPU generator keeps only the low 32 bits of a seed, so (seed << 32) + epoch would ignore the seed."""
    return np.random.default_rng(key).permutation(num).tolist()


def batch_rows(num_rows: int, batch_size: int, step: int, *, seed: int, total: int | None = None) -> list[int]:
    """Returns the rows of step 0, 1, ...: consecutive pieces of one endless stream of shuffled epochs.

    A batch may begin in one epoch and end in the next, so every row is used once an epoch and none is dropped.

    total: the length of the stream, where it ends (the last batch may be smaller, and those after it are empty)

    Raises: ValueError for no rows, an empty batch or a negative step."""
    if num_rows < 1 or batch_size < 1 or step < 0:
        raise ValueError(
            "batch_rows: num_rows and batch_size must be at least 1 and step at least 0, got "
            f"{num_rows}, {batch_size} and {step}"
        )
    stop = (step + 1) * batch_size
    return stream(num_rows, step * batch_size, stop if total is None else min(stop, total), seed=seed)


def stream(num_rows: int, start: int, stop: int, *, seed: int) -> list[int]:
    """Returns a piece of the endless stream of shuffled epochs, from its place `start` to before `stop`."""
    rows: list[int] = []
    while start < stop:
        epoch, offset = divmod(start, num_rows)
        rows += shuffled(num_rows, seed, epoch)[offset : offset + stop - start]
        start += min(num_rows - offset, stop - start)
    return rows
