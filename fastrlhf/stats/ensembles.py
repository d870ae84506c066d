"""What several reward models know together, and whether they know when they do not know."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastrlhf.errors import UserError
from fastrlhf.stats.accuracy import Accuracy, accuracy, quantile_bins


@dataclass(frozen=True)
class Bin:
    """Pairs about which models disagree as much: the mean standard deviation of their margins, and how often the mean
    of the models is right."""

    disagreement: float
    accuracy: Accuracy


@dataclass(frozen=True)
class Ensemble:
    """M models on the same pairs. Standard deviations are over them, with M in the denominator.

    score_std: mean over responses of the standard deviation of the models' scores
    margin_std: mean over pairs of that of their margins, from which a constant that a model adds to all scores is gone
    split: share of pairs on which some model prefers the chosen response and some the rejected one
    mean, min, mean_minus_std: accuracy of these over the models' scores of each response
    members: accuracy of each model; bins: by disagreement, ascending

    Source: min ("worst case") and mean minus std ("uncertainty weighted"; theirs takes the variance): Coste et al.,
    arXiv 2310.02743."""

    score_std: float
    margin_std: float
    split: float
    mean: Accuracy
    min: Accuracy
    mean_minus_std: Accuracy
    members: list[Accuracy]
    bins: list[Bin]


def ensemble(
    scores: Tensor, labels: Tensor | None = None, *, clusters: Sequence[Hashable] | None = None, num_bins: int = 5
) -> Ensemble:
    """Returns how models agree. scores: (M, N, 2) of chosen and rejected responses, M >= 2; labels: as for `hits`

    Raises: ValueError for fewer than two models."""
    if len(scores) < 2:
        raise UserError(f"ensemble: at least 2 models can disagree, got {len(scores)}")
    scores = scores.double()
    margins = scores[..., 0] - scores[..., 1]
    spread, mean = margins.std(0, correction=0), margins.mean(0)

    def of(combined: Tensor) -> Accuracy:  # (N, 2)
        return accuracy(combined[:, 0] - combined[:, 1], labels, clusters=clusters)

    def inside(rows: Tensor) -> Accuracy:
        own = None if clusters is None else [clusters[row] for row in rows.tolist()]
        return accuracy(mean[rows], None if labels is None else labels[rows], clusters=own)

    return Ensemble(
        score_std=scores.std(0, correction=0).mean().item(),
        margin_std=spread.mean().item(),
        split=((margins > 0).any(0) & (margins < 0).any(0)).double().mean().item(),
        mean=of(scores.mean(0)),
        min=of(scores.min(0).values),
        mean_minus_std=of(scores.mean(0) - scores.std(0, correction=0)),
        members=[of(each) for each in scores],
        bins=[Bin(spread[rows].mean().item(), inside(rows)) for rows in quantile_bins(spread, num_bins)],
    )
