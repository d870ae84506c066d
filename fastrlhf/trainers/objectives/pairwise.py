"""Objectives on responses to one prompt that were compared: pairs and rankings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastrlhf.data import Pair, Ranking
from fastrlhf.ops import pairwise_reward_loss, ranking_loss
from fastrlhf.stats.accuracy import is_right
from fastrlhf.trainers.objectives.base import Loss, SingleHeadObjective, accuracy_of


class Pairs(SingleHeadObjective[Pair]):
    """-p log sigmoid(h) - (1 - p) log sigmoid(-h), h = chosen - rejected - margin, weighted (Bradley-Terry)."""

    def best(self, row: Pair) -> int:
        return int(row.preference < 0.5)

    def loss(self, scores: Tensor, rows: Sequence[Pair], denominator: int) -> Loss:
        config = self.config
        loss, stats = self._loss(scores, rows, config.label_smoothing, config.center_coef, denominator)
        if any(row.preference < 1 for row in rows):  # the op counts the first response as the better one
            labels, margins = scores.new_tensor([row.preference for row in rows]), self.own(scores.detach(), rows)
            hits = torch.where(labels == 0.5, 0.5, is_right(margins[0::2] - margins[1::2], labels))
            stats = {**stats, "accuracy": hits.sum().to(scores) / denominator}
        return loss, stats

    def _loss(self, scores: Tensor, rows: Sequence[Pair], smoothing: float, center: float, denominator: int) -> Loss:
        scores = self.own(scores, rows)
        columns = [(row.margin, row.weight, row.preference) for row in rows]
        margin, weights, targets = scores.new_tensor(columns).view(-1, 3).t()
        return pairwise_reward_loss(
            scores[0::2],
            scores[1::2],
            margin=margin,
            weights=weights,
            targets=targets,
            label_smoothing=smoothing,
            center_coef=center,
            denominator=denominator,
        )

    def measure(self, scores: Tensor, rows: Sequence[Pair]) -> dict[str, float]:
        """A pair of preference 1/2 has no better side, so it is in the loss only."""
        loss, _ = self._loss(scores, rows, 0.0, 0.0, len(rows))
        scores = self.own(scores, rows)
        return {"loss": loss.item(), **accuracy_of_pairs(scores[0::2] - scores[1::2], rows)}


def accuracy_of_pairs(margins: Tensor, rows: Sequence[Pair]) -> dict[str, float]:
    """The accuracy on pairs, of which the first response is ahead by margins (N,), with its interval; those of
    preference 1/2 are left out."""
    labels = torch.tensor([row.preference for row in rows], dtype=torch.float64)
    decided = labels != 0.5
    hits = is_right(margins.cpu(), labels)[decided]
    found = accuracy_of(hits, [row for row in rows if row.preference != 0.5])
    return {**found, "ties": int((hits == 0.5).sum()), "num_pairs": len(hits)}


class Rankings(SingleHeadObjective[Ranking]):
    """Plackett-Luce, or all pairs of a row, each of weight 1 / their number."""

    def __init__(self, kind: str, *args: Any) -> None:
        super().__init__(*args)
        self.kind = kind

    def loss(self, scores: Tensor, rows: Sequence[Ranking], denominator: int) -> Loss:
        scores = self.own(scores, rows)
        ties = [n > 0 and row.ranks[n] == row.ranks[n - 1] for row in rows for n in range(len(row.ranks))]
        if self.kind == "all_pairs" and self.config.ties == "skip" and any(ties):
            return self._untied(scores, rows, denominator)
        return ranking_loss(
            scores,
            torch.tensor([0, *accumulate(len(row.ranks) for row in rows)], dtype=torch.int32, device=scores.device),
            kind="pairwise" if self.kind == "all_pairs" else self.kind,
            ties=torch.tensor(ties, dtype=torch.bool, device=scores.device),
            denominator=denominator,
        )

    def _untied(self, scores: Tensor, rows: Sequence[Ranking], denominator: int) -> Loss:
        better, worse, weights = untied_pairs(rows)
        weight = scores.new_tensor(weights)
        loss, _ = pairwise_reward_loss(scores[better], scores[worse], weights=weight, denominator=denominator)
        margin = (scores[better] - scores[worse]).detach()
        accuracy = 0.5 * len(rows) + (weight * 0.5 * margin.sign()).sum()  # a row of ties alone counts one half
        return loss, {"accuracy": accuracy / denominator, "margin": (weight * margin).sum() / denominator}

    def measure(self, scores: Tensor, rows: Sequence[Ranking]) -> dict[str, float]:
        """The accuracy is over the untied pairs of a row, then over rows."""
        loss, _ = self.loss(scores, rows, len(rows))
        better, worse, weights = untied_pairs(rows)
        scores = self.own(scores, rows)
        margin, weight = scores[better] - scores[worse], scores.new_tensor(weights)
        of_row = torch.tensor([n for n, row in enumerate(rows) for _ in range(num_untied(row))], dtype=torch.int64)
        hits = torch.zeros(len(rows), dtype=scores.dtype, device=scores.device)
        hits.index_add_(0, of_row.to(scores.device), weight * (0.5 + 0.5 * margin.sign()))
        decided = [n for n, row in enumerate(rows) if num_untied(row)]
        found = accuracy_of(hits[decided], [rows[n] for n in decided])
        return {"loss": loss.item(), **found, "ties": int((margin == 0).sum()), "num_pairs": len(better)}


def untied_pairs(rows: Sequence[Ranking]) -> tuple[list[int], list[int], list[float]]:
    """For each pair of different rank, the places of the better and the worse response among those of the rows, and a
    weight: 1 / the number of such pairs of its row."""
    better, worse, weights, start = [], [], [], 0
    for row in rows:
        size = len(row.ranks)
        pairs = [(i, j) for i in range(size) for j in range(i + 1, size) if row.ranks[i] < row.ranks[j]]
        better += [start + i for i, _ in pairs]
        worse += [start + j for _, j in pairs]
        weights += [1 / len(pairs) for _ in pairs]
        start += size
    return better, worse, weights


def num_untied(row: Ranking) -> int:
    """The number of pairs of a row whose ranks differ."""
    ranks = row.ranks
    return sum(a != b for n, a in enumerate(ranks) for b in ranks[n + 1 :])
