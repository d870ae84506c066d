"""Rows of every layout as one thing, to be compared and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastrlhf.data.judged import Labelled, Pair, Ranking, Rated
from fastrlhf.data.rows import Demonstration, Prompt

Tokens = Sequence[int]


@dataclass(frozen=True)
class Item:
    """A row of any layout: its prompt, its responses, and what it says of them.

    ranks: of the responses, smaller is better; label: of a single response; columns: what else its row says"""

    prompt: Tokens
    responses: Sequence[Tokens]
    ranks: Sequence[float] = ()
    label: Any = None  # can be a key
    columns: dict[str, Any] = field(default_factory=dict)


def item_of(row: Any) -> Item:
    """What a loaded row says. Of several turns the response is the last answer; a text has no prompt."""
    if isinstance(row, Prompt):
        return Item(row.tokens, [], columns=row.columns)
    if isinstance(row, Demonstration):
        return _demonstration(row)
    columns = {**row.columns, "head": getattr(row, "head", None)}
    label: Any = None
    ranks: Sequence[float] = ()
    if isinstance(row, Pair):
        side = (row.preference > 0.5) - (row.preference < 0.5)
        ranks = (-side, side)
    elif isinstance(row, Ranking):
        ranks = tuple(row.ranks)
    elif isinstance(row, Labelled):
        label = row.label
    elif isinstance(row, Rated):
        label = tuple(sorted(row.ratings.items()))
    return Item(row.prompt, row.responses, ranks, label, columns)


def _demonstration(row: Demonstration) -> Item:
    tokens = row.answered
    mask = row.response_mask[: len(tokens)]
    start = 0 if all(mask[1:]) else len(mask) - next(n for n, learned in enumerate(reversed(mask)) if not learned)
    return Item(tokens[:start], [tokens[start:]])
