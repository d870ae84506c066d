"""What is to be known of a file's rows before they are trained on: lengths, repetitions, contradictions."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from fastrlhf.data.items import Item, Tokens, item_of


@dataclass(frozen=True)
class Repetitions:
    """rows: those that repeat an earlier row; prompts: rows that repeat an earlier prompt; contradictions:
    pairs (or responses) that are labelled in opposite (or different) ways"""

    rows: int
    prompts: int
    contradictions: int


def digest(*texts: Tokens) -> bytes:
    """16 bytes for token lists, in place of the lists themselves as keys."""
    found = hashlib.blake2b(digest_size=16)
    for tokens in texts:
        found.update(len(tokens).to_bytes(8, "little") + array("q", tokens).tobytes())
    return found.digest()


def percentiles(lengths: Sequence[int], shares: Sequence[float]) -> list[int]:
    """The smallest length that so many per cent of the lengths do not exceed, for each share."""
    return [int(value) for value in np.percentile(lengths, shares, method="inverted_cdf")]


def repetitions(items: Sequence[Item]) -> Repetitions:
    """Counts rows and prompts that occur before, and contradictory labels."""
    prompts = Counter(digest(item.prompt) for item in items if item.prompt)
    rows = Counter(
        (digest(item.prompt, *item.responses), tuple(item.ranks), item.label, _said_by(item, "head", "rater"))
        for item in items
    )
    verdicts: dict[Hashable, set[Hashable]] = {}
    for item in items:
        for key, verdict in _verdicts(item):
            verdicts.setdefault((key, _said_by(item, "head")), set()).add(verdict)
    return Repetitions(
        rows=sum(count - 1 for count in rows.values()),
        prompts=sum(count - 1 for count in prompts.values()),
        contradictions=sum(len(found) > 1 for found in verdicts.values()),
    )


def warnings(rows: Sequence[Any], held_out: Sequence[Any]) -> list[str]:
    """Lines on rows of a loader that are repeated, and on held-out rows whose prompt is trained on."""
    items, others = ([item_of(row) for row in each] for each in (rows, held_out))
    lines = []
    if repeated := repetitions(items).rows:
        lines.append(f"  {repeated} of the {len(items)} rows to train on repeat an earlier row")
    prompts = {digest(item.prompt) for item in items if item.prompt}
    if shared := sum(digest(item.prompt) in prompts for item in others):
        lines.append(f"warning: the prompts of {shared} of the {len(others)} held-out rows are trained on too")
    return lines


def _said_by(item: Item, *names: str) -> str:
    """For which head, and by whom: what another head is told, or another rater says, repeats nothing."""
    return repr([item.columns.get(name) for name in names])


def _verdicts(item: Item) -> list[tuple[Hashable, Hashable]]:
    """(what is judged, how) of each pair of responses that are not tied, or of the one response that has a label."""
    if item.label is not None:
        return [(digest(item.prompt, *item.responses), item.label)]
    found: list[tuple[Hashable, Hashable]] = []
    for (a, rank_a), (b, rank_b) in combinations(zip(item.responses, item.ranks, strict=False), 2):
        if rank_a != rank_b:
            better, worse = (a, b) if rank_a < rank_b else (b, a)
            first, second = digest(better), digest(worse)
            found.append(((digest(item.prompt), *sorted((first, second))), first < second))
    return found


def shared_prompts(items: Sequence[Item], count: Callable[[Tokens], int]) -> tuple[float, float]:
    """(share of prompts in all tokens when each response is read with its own prompt, share of tokens that need not be
    computed when the responses of a prompt are read after one).

    The responses of a prompt are those of a row, or, of rows with one response each, those of equal prompts."""
    groups: dict[Hashable, list[int]] = {}  # tokens of the prompt, how many responses, their tokens
    for n, item in enumerate(items):
        key = n if len(item.responses) > 1 else digest(item.prompt)
        group = groups.setdefault(key, [count(item.prompt), 0, 0])
        group[1] += len(item.responses)
        group[2] += sum(map(count, item.responses))
    apart = sum(prompt * num + rest for prompt, num, rest in groups.values())
    prompts = sum(prompt * num for prompt, num, _ in groups.values())
    spared = sum(prompt * (num - 1) for prompt, num, _ in groups.values())
    return prompts / apart, spared / apart


def chosen_is_longer(items: Sequence[Item], count: Callable[[Tokens], int]) -> tuple[float, float]:
    """(share of pairs whose better response is longer, share where both are as long); of rankings all pairs count."""
    longer = same = total = 0
    for item in items:
        for (a, rank_a), (b, rank_b) in combinations(zip(item.responses, item.ranks, strict=False), 2):
            if rank_a != rank_b:
                more = (count(a) - count(b)) * (1 if rank_a < rank_b else -1)
                longer, same, total = longer + (more > 0), same + (more == 0), total + 1
    return (longer / total, same / total) if total else (float("nan"), float("nan"))
