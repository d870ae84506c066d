"""How the sequences of a pack are cut into shares of processes and into micro-batches: by their lengths alone.

lengths, prefixes: Packed.lengths and prefix_lengths, 0 where there is none"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def groups(num_sequences: int, together: int | Sequence[int]) -> list[range]:
    """The sequences that stay together.

    together: so many neighbours, or how many of each group in turn

    Raises: ValueError when groups of these sizes are not the sequences."""
    if isinstance(together, int):
        bounds = [*range(0, num_sequences, together), num_sequences]
    else:
        bounds = [0, *accumulate(together)]
        if bounds[-1] != num_sequences:
            raise ValueError(f"Packed: groups of {list(together)} are not the {num_sequences} sequences")
    return [range(*ends) for ends in pairwise(bounds)]


def shares(units: Sequence[range], lengths: Sequence[int], of: int) -> list[range]:
    """The sequences of each of so many shares: neighbouring groups, about as many tokens in each share."""
    bounds = [0] * (of + 1)
    done, total = 0, max(sum(lengths), 1)
    for group in units:
        length = sum(lengths[n] for n in group)
        middle = (2 * done + length) * of // (2 * total)  # the share in which the middle of the group lies
        for later in range(min(middle, of - 1) + 1, of + 1):
            bounds[later] = group.stop
        done += length
    return [range(*ends) for ends in pairwise(bounds)]


def packs(units: Sequence[range], lengths: Sequence[int], prefixes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """The sequences of each micro-batch of at most max_tokens tokens, or of a single longer group.

    prefixes: what the first sequence of a micro-batch takes along of the one that it goes on from"""
    found: list[list[int]] = []
    room = 0
    for group in units:
        length = sum(lengths[n] for n in group)
        if length > room:
            found.append([])
            room = max_tokens - prefixes[group.start]
        found[-1] += group
        room -= length
    return found


def wholes_of(prefixes: Sequence[int]) -> list[int]:
    """For each sequence the one that it goes on from, itself if it is whole."""
    wholes: list[int] = []
    for n, prefix in enumerate(prefixes):
        wholes.append(wholes[-1] if prefix else n)
    return wholes


def carry(indices: Sequence[int], wholes: Sequence[int], lengths: Sequence[int], prefixes: Sequence[int]) -> list[int]:
    """How many tokens of its prefix each of some sequences, in that order, takes along: all of it unless the one before
    it goes on from the same sequence and has, or sees, as much of it."""
    carried = []
    last, room = -1, 0
    for n in indices:
        found = wholes[n] == last and prefixes[n] <= room
        carried.append(0 if found else prefixes[n])
        last, room = wholes[n], prefixes[n] or lengths[n]
    return carried
