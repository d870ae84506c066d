"""Rows of any judgement as pairs: of two responses to one prompt, the one that was judged better comes first."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations

from fastrlhf.data.judged import RATING, Judged, Labelled, Pair, Ranking, Rated


def comparisons(rows: Sequence[Judged]) -> list[Pair]:
    """Returns the pairs that rows make; rows of labels and of ratings are compared with the others on their prompt.

    A ranking makes a pair of each two responses of different ranks. Labels p > q make one whose first response is the
    better with probability p (1 - q) / (p (1 - q) + q (1 - p)): that it is right and the other wrong, given that one of
    them is. Ratings make one by each attribute in which they differ, with the difference as margin and the attribute as
    head. A pair has the columns in which its rows agree; equal responses make none."""
    pairs: list[Pair] = []
    alone: dict[Hashable, list[Labelled | Rated]] = {}
    for row in rows:
        if isinstance(row, Pair):
            pairs.append(row)
        elif isinstance(row, Ranking):
            for good, bad in combinations(range(len(row.responses)), 2):
                if row.ranks[good] < row.ranks[bad]:
                    chosen, rejected = row.responses[good], row.responses[bad]
                    pairs.append(Pair(row.prompt, chosen, rejected, columns=row.columns, head=row.head))
        else:
            alone.setdefault((tuple(row.prompt), getattr(row, "head", None)), []).append(row)
    for found in alone.values():
        for first, second in combinations(found, 2):
            pairs += _of_labels(first, second) if isinstance(first, Labelled) else _of_ratings(first, second)
    return [pair for pair in pairs if pair.chosen != pair.rejected]


def _of_labels(first: Labelled, second: Labelled | Rated) -> Iterator[Pair]:
    assert isinstance(second, Labelled)
    good, bad = (first, second) if first.label > second.label else (second, first)
    right, wrong = good.label * (1 - bad.label), bad.label * (1 - good.label)
    if right > wrong:
        columns, preference = _common(good, bad), right / (right + wrong)
        yield Pair(good.prompt, good.response, bad.response, columns=columns, preference=preference, head=good.head)


def _of_ratings(first: Rated, second: Labelled | Rated) -> Iterator[Pair]:
    assert isinstance(second, Rated)
    for name in (name for name in first.ratings if name in second.ratings):  # a set of texts has another order each run
        good, bad = (first, second) if first.ratings[name] > second.ratings[name] else (second, first)
        margin, head = good.ratings[name] - bad.ratings[name], None if name == RATING else name
        if margin:
            yield Pair(good.prompt, good.response, bad.response, margin=margin, columns=_common(good, bad), head=head)


def _common(first: Judged, second: Judged) -> dict[str, object]:
    return {name: value for name, value in first.columns.items() if second.columns.get(name) == value}
