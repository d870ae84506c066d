"""The order in which rows are trained on: a function of the seed and the step, so a resumed run needs only its step."""

from __future__ import annotations

import numpy as np

# what an order is for, so that a run's orders are independent of each other; checkpoints hold the numbers
ROWS, MINIBATCHES, PTX, SPLIT = range(4)


def shuffled(num: int, seed: int, number: int = 0, *, purpose: int = ROWS) -> list[int]:
    """Returns 0 ... num - 1 in an order that follows from seed, number and purpose.

    torch's CPU generator keeps only the low 32 bits of a seed, so (seed << 32) + epoch would ignore the seed. ROWS
    draws as it did when there were no purposes; those of the others stand in a spawn key, apart from any seed."""
    if purpose == ROWS:
        return np.random.default_rng((seed, number)).permutation(num).tolist()
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, number))).permutation(num).tolist()


def batch_rows(
    num_rows: int, batch_size: int, step: int, *, seed: int, total: int | None = None, purpose: int = ROWS
) -> list[int]:
    """Returns the rows of step 0, 1, ...: consecutive pieces of one endless stream of shuffled epochs.

    A batch may begin in one epoch and end in the next, so every row is used once an epoch and none is dropped.

    total: the length of the stream, where it ends (the last batch may be smaller, and those after it are empty)
    purpose: as for `shuffled`

    Raises: ValueError for no rows, an empty batch or a negative step."""
    if num_rows < 1 or batch_size < 1 or step < 0:
        raise ValueError(
            "batch_rows: num_rows and batch_size must be at least 1 and step at least 0, got "
            f"{num_rows}, {batch_size} and {step}"
        )
    stop = (step + 1) * batch_size
    stop = stop if total is None else min(stop, total)
    return stream(num_rows, step * batch_size, stop, seed=seed, purpose=purpose)


def stream(num_rows: int, start: int, stop: int, *, seed: int, purpose: int = ROWS) -> list[int]:
    """Returns a piece of the endless stream of shuffled epochs, from its place `start` to before `stop`."""
    rows: list[int] = []
    while start < stop:
        epoch, offset = divmod(start, num_rows)
        rows += shuffled(num_rows, seed, epoch, purpose=purpose)[offset : offset + stop - start]
        start += min(num_rows - offset, stop - start)
    return rows
