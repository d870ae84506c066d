"""Objectives on responses that were judged each by itself: outcome labels and ratings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf.data import RATING, Labelled, Rated
from fastrlhf.errors import DataError
from fastrlhf.settings.training import RewardConfig
from fastrlhf.stats.accuracy import is_right
from fastrlhf.stats.correlation import correlation_interval, pearson
from fastrlhf.trainers.objectives.base import Loss, Objective, SingleHeadObjective, accuracy_of


class Outcomes(SingleHeadObjective[Labelled]):
    """-y log sigmoid(s) - (1 - y) log sigmoid(-s), weighted: s is the log odds that a response is right."""

    def loss(self, scores: Tensor, rows: Sequence[Labelled], denominator: int) -> Loss:
        scores = self.own(scores, rows)
        labels, weights = scores.new_tensor([(row.label, row.weight) for row in rows]).view(-1, 2).t()
        losses = weights * F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        stats = {"accuracy": 0.5 + 0.5 * (scores * (labels - 0.5)).sign(), "scores": scores}
        return losses.sum() / denominator, {name: x.detach().sum() / denominator for name, x in stats.items()}

    def measure(self, scores: Tensor, rows: Sequence[Labelled]) -> dict[str, float]:
        """common: the accuracy of giving all the more common label. A label of 1/2 is in the loss only."""
        loss, _ = self.loss(scores, rows, len(rows))
        side = scores.new_tensor([row.label for row in rows]) - 0.5
        hits = is_right(self.own(scores, rows), side + 0.5)[side != 0]
        right = (side > 0).sum().item() / max(len(hits), 1)
        found = accuracy_of(hits, [row for row in rows if row.label != 0.5])
        return {"loss": loss.item(), **found, "common": max(right, 1 - right), "num_labels": len(hits)}


class Ratings(Objective[Rated]):
    """The mean over a row's attributes of ((s - rating) / deviation)^2: scores are in the units of the ratings.

    means, deviations: (H,) float64, of the ratings to train on; heads start at the mean"""

    def __init__(self, config: RewardConfig, rows: Sequence[Rated], held_out: Sequence[Rated]) -> None:
        super().__init__(config, rows, held_out)
        if self.heads == (RATING,):
            self.heads = ()
        table = self.table(rows)
        counts, given = table.isfinite().sum(0), table.nan_to_num()
        self.means = given.sum(0) / counts
        squares = torch.where(table.isfinite(), table - self.means, 0).square()
        self.deviations = (squares.sum(0) / counts).sqrt()
        for name, column in zip(self.names, table.t(), strict=True):
            if column[column.isfinite()].unique().numel() < 2:  # their deviation may be a rounding above 0
                raise DataError(f"data: all ratings of {name!r} are the same, so there is nothing to learn")

    @property
    def names(self) -> tuple[str, ...]:
        return self.heads or (RATING,)

    def heads_of(self, row: Rated) -> Sequence[str | None]:
        return [*row.ratings]

    def table(self, rows: Sequence[Rated]) -> Tensor:
        """(N, H) float64, NaN where a row does not rate an attribute."""
        values = [[row.ratings.get(name, math.nan) for name in self.names] for row in rows]
        return torch.tensor(values, dtype=torch.float64).view(-1, len(self.names))

    def loss(self, scores: Tensor, rows: Sequence[Rated], denominator: int) -> Loss:
        table = self.table(rows).to(scores)
        given, deviations = table.isfinite(), self.deviations.to(scores)
        errors = torch.where(given, scores - table.nan_to_num(), 0)
        losses = (errors / deviations).square().sum(1) / given.sum(1)
        stats = {"error": (errors.abs().sum(1) / given.sum(1)).detach()}
        return losses.sum() / denominator, {name: x.sum() / denominator for name, x in stats.items()}

    def measure(self, scores: Tensor, rows: Sequence[Rated]) -> dict[str, float]:
        """Means over the attributes of root mean squared error and correlation; with its interval where there is one
        attribute."""
        loss, _ = self.loss(scores, rows, len(rows))
        table = self.table(rows).to(scores)
        metrics: dict[str, float] = {"loss": loss.item()}
        found = []
        for name, given, score in zip(self.names, table.t(), scores.t(), strict=True):
            rated = given.isfinite()
            if rated.any():
                prompts = {tuple(row.prompt) for row, here in zip(rows, rated.tolist(), strict=True) if here}
                found.append(regression(given[rated], score[rated], len(prompts)))
                if len(self.names) > 1:
                    metrics |= {f"{name}/{key}": value for key, value in found[-1].items()}
        means = ("rmse", "correlation") if len(self.names) > 1 else tuple(found[0])
        return metrics | {key: sum(each[key] for each in found) / len(found) for key in means}

    def evaluate(self, scores: Tensor, rows: Sequence[Rated]) -> dict[str, float]:
        return self.measure(scores, rows)


def regression(given: Tensor, score: Tensor, num_prompts: int) -> dict[str, float]:
    """Error, correlation and the ends of its 95 % interval, of as many rows as there are prompts, of scores (N,) of
    ratings (N,)."""
    r = pearson(given, score)
    low, high = correlation_interval(r, num_prompts)
    rmse = (given - score).square().mean().sqrt().item()
    return {"rmse": rmse, "correlation": r, "correlation_low": low, "correlation_high": high, "num_ratings": len(given)}
