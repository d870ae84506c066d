"""What the labels themselves are worth: how far raters agree, and what accuracy is possible at all.

An item is a prompt with two responses, in either order, judged for one head; a vote is what one label says of it.
"""

from __future__ import annotations

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from fastrlhf.stats.accuracy import wilson_interval

Tokens = Sequence[int]


@dataclass(frozen=True)
class Vote:
    """item: its number; label: P(the first of its two responses, whose order is fixed, is the better)"""

    item: int
    label: float

    @property
    def side(self) -> int:
        """+1 or -1, which response is the better; 0: neither."""
        return (self.label > 0.5) - (self.label < 0.5)


@dataclass(frozen=True)
class Repeats:
    """Pairs of which a file has several.

    num_items: different items; duplicates: rows that say of an item what an earlier row said, by the same rater where
    raters are known; contradicted: items of which rows say both; self_contradicted: of which one rater says both;
    best_accuracy: the highest that any scores could have on these very rows: sum over items of the votes of the side
    that has more of them / all votes; NaN without a vote"""

    num_rows: int
    num_items: int
    duplicates: int
    contradicted: int
    self_contradicted: int | None
    best_accuracy: float


@dataclass(frozen=True)
class Agreement:
    """How far raters agree on items that several of them judged.

    agreement: mean over items of the share of pairs of raters who say the same, n_1 (n_1 - 1) + n_2 (n_2 - 1) over
    n (n - 1) (Fleiss, Psychological Bulletin 76 (1971) 378); low, high: `wilson_interval`, a trial an item
    kappa: 2 agreement - 1, agreement beyond that of coins (Brennan and Prediger, Educational and Psychological
    Measurement 41 (1981) 687, with two categories)
    ceiling: `ceiling` of the agreement; ceiling_high: of the upper end of its interval
    raters: of each, the items that he shares with others and the share of the others' votes on them that are his"""

    agreement: float
    low: float
    high: float
    kappa: float
    ceiling_low: float
    ceiling: float
    ceiling_high: float
    num_items: int
    raters: dict[str, tuple[int, float]]


def votes(
    prompts: Sequence[Tokens],
    chosen: Sequence[Tokens],
    rejected: Sequence[Tokens],
    labels: Sequence[float] | None = None,
    heads: Sequence[str | None] | None = None,
) -> list[Vote]:
    """Returns the vote of each row. labels: P(chosen is better), default 1; below 1/2 the rejected one gets the vote;
    heads: what each is a label of, such as helpful, default one for all"""
    numbers: dict[Hashable, int] = {}
    found = []
    for n, (prompt, good, bad) in enumerate(zip(prompts, chosen, rejected, strict=True)):
        first, second = tuple(good), tuple(bad)
        swapped = second < first
        both, head = (second, first) if swapped else (first, second), None if heads is None else heads[n]
        item = numbers.setdefault((tuple(prompt), *both, head), len(numbers))
        label = 1.0 if labels is None else labels[n]
        found.append(Vote(item, 1 - label if swapped else label))
    return found


def repeats(cast: Sequence[Vote], raters: Sequence[Hashable] | None = None) -> Repeats:
    """Returns what the rows say more than once. raters: who cast each vote, None where nobody knows"""
    names = [None] * len(cast) if raters is None else raters
    rows = Counter((vote.item, vote.side, name) for vote, name in zip(cast, names, strict=True))
    sides: dict[Hashable, Counter[int]] = defaultdict(Counter)
    own: dict[Hashable, set[int]] = defaultdict(set)
    for vote, name in zip(cast, names, strict=True):
        sides[vote.item][vote.side] += 1
        own[vote.item, name] |= {vote.side}
    best, num_votes = (sum(of(said[1], said[-1]) for said in sides.values()) for of in (max, operator.add))
    return Repeats(
        num_rows=len(cast),
        num_items=len(sides),
        duplicates=sum(count - 1 for count in rows.values()),
        contradicted=sum({1, -1} <= votes.keys() for votes in sides.values()),
        self_contradicted=None if raters is None else sum({1, -1} <= said for said in own.values()),
        best_accuracy=best / num_votes if num_votes else math.nan,
    )


def agreement(cast: Sequence[Vote], raters: Sequence[Hashable]) -> Agreement | None:
    """Returns how far raters agree; None if no item has two. A rater's vote on an item is what most of his rows say of
    it, none if they say both as often. raters: who cast each vote; rows of None are left out"""
    said: dict[int, dict[Hashable, int]] = defaultdict(lambda: defaultdict(int))
    for vote, name in zip(cast, raters, strict=True):
        if name is not None:
            said[vote.item][name] += vote.side
    items = [{name: side > 0 for name, side in sides.items() if side} for sides in said.values()]
    items = [sides for sides in items if len(sides) > 1]
    if not items:
        return None
    shares, own = [], defaultdict(list)
    for sides in items:
        num, first = len(sides), sum(sides.values())
        shares.append((first * (first - 1) + (num - first) * (num - first - 1)) / (num * (num - 1)))
        for name, side in sides.items():
            own[str(name)].append(((first if side else num - first) - 1) / (num - 1))
    share = sum(shares) / len(shares)
    low, high = wilson_interval(share, len(shares))
    return Agreement(
        agreement=share,
        low=low,
        high=high,
        kappa=2 * share - 1,
        ceiling_low=max(share, 0.5),
        ceiling=ceiling(share),
        ceiling_high=ceiling(high),
        num_items=len(items),
        raters={name: (len(values), sum(values) / len(values)) for name, values in sorted(own.items())},
    )


def ceiling(share: float) -> float:
    """Returns the highest accuracy on single votes that is possible where two raters agree in a share of the cases.

    (1 + sqrt(2 a - 1)) / 2, and 1/2 for a below 1/2. If a share m >= 1/2 of all raters would prefer one response of an
    item, two of them agree with a = m^2 + (1 - m)^2, of which m is the formula above; no scores are right more often
    than m. It is concave in a, so over items of different m the best accuracy is at most its value at the mean of a; it
    is at least the mean of a, since m >= m^2 + (1 - m)^2."""
    return (1 + max(2 * share - 1, 0.0) ** 0.5) / 2
