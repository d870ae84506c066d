"""What all objectives of reward models have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastrlhf.data import Labelled, Pair, Ranking, Rated
from fastrlhf.errors import DataError
from fastrlhf.settings.training import RewardConfig
from fastrlhf.stats.accuracy import accuracy_of_hits

T = TypeVar("T", Pair, Ranking, Labelled, Rated)
H = TypeVar("H", Pair, Ranking, Labelled)
Loss = tuple[Tensor, dict[str, Tensor]]


class Objective(ABC, Generic[T]):
    """heads: the names of the heads, in order; () for one without a name."""

    heads: tuple[str, ...]

    def __init__(self, config: RewardConfig, rows: Sequence[T], held_out: Sequence[T]) -> None:
        self.config = config
        names, others = ({name for row in each for name in self.heads_of(row)} for each in (rows, held_out))
        self.heads = tuple(sorted(name for name in names if name is not None))
        if None in names | others and len(names | others) > 1:
            given = ", ".join(sorted(filter(None, names | others)))
            raise DataError(f"data: some rows have a head ({given}) and others none")
        for name in others - names:
            raise DataError(f"data: no row to train on has the head {name!r} of a held-out row")
        self.number: dict[str | None, int] = {name: n for n, name in enumerate(self.heads)}

    @abstractmethod
    def heads_of(self, row: T) -> Sequence[str | None]:
        """The heads that a row is for."""

    def best(self, row: T) -> int:
        """The place of the best of a row's responses, where they are compared."""
        return 0

    @abstractmethod
    def loss(self, scores: Tensor, rows: Sequence[T], denominator: int) -> Loss:
        """The loss of rows, a share of denominator, and their statistics."""

    @abstractmethod
    def measure(self, scores: Tensor, rows: Sequence[T]) -> dict[str, float]:
        """The metrics of held-out rows, from their scores in float64."""

    def evaluate(self, scores: Tensor, rows: Sequence[T]) -> dict[str, float]:
        """`measure` of all rows, and, if there are several heads, NAME/... of those of each."""
        metrics = self.measure(scores, rows)
        if len(self.heads) < 2:
            return metrics
        parts = scores.split([len(row.responses) for row in rows])
        for name in self.heads:
            its = [n for n, row in enumerate(rows) if name in self.heads_of(row)]
            if its:
                found = self.measure(torch.cat([parts[n] for n in its]), [rows[n] for n in its])
                metrics |= {f"{name}/{key}": value for key, value in found.items()}
        return metrics


class SingleHeadObjective(Objective[H]):
    """An objective on rows that are each for one head."""

    def heads_of(self, row: H) -> Sequence[str | None]:
        return [row.head]

    def own(self, scores: Tensor, rows: Sequence[H]) -> Tensor:
        """(M,) the scores of each response by the head that its row is for."""
        if not self.heads:
            return scores[:, 0]
        numbers = [self.number[row.head] for row in rows for _ in row.responses]
        return scores.gather(1, torch.tensor(numbers, dtype=torch.int64, device=scores.device)[:, None])[:, 0]


def accuracy_of(hits: Tensor, rows: Sequence[Any]) -> dict[str, float]:
    """The mean of hits (N,) in [0, 1] on N rows, with the ends of its 95 % interval, for which rows on one prompt are
    as many trials as they are worth; without a row nothing is known."""
    found = accuracy_of_hits(hits, [tuple(row.prompt) for row in rows])
    return {"accuracy": found.accuracy, "accuracy_low": found.low, "accuracy_high": found.high}
