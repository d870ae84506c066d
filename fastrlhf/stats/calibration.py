"""Whether a score difference d means what the Bradley-Terry model says, that the first is better with probability
sigmoid(d).

Source of the model: Bradley and Terry, Biometrika 39 (1952) 324.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf.errors import UserError
from fastrlhf.stats.accuracy import hits, number, quantile_bins


@dataclass(frozen=True)
class Reliability:
    """Pairs in bins of the probability that the model gives to the response it prefers.

    predicted: its mean in each bin; observed: share in which the label agrees; counts: pairs"""

    predicted: list[float]
    observed: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Calibration:
    """How good the probabilities are. Each measure has a value to compare it with.

    log_loss: mean of -y log p - (1 - y) log (1 - p), nats, p = sigmoid(d); always saying 1/2 has log 2 = 0.693
    brier: mean of (p - y)^2; always saying 1/2 has 0.25 (Brier, Monthly Weather Review 78 (1950) 1, for one class)
    ece: `calibration_error` of the response that is preferred; ece_by_chance: what it would be if every probability
    were right, on average and in one of twenty cases or less (`error_by_chance`)"""

    log_loss: float
    brier: float
    ece: float
    ece_by_chance: float
    ece_by_chance_high: float


def measure(margins: Tensor, labels: Tensor | None = None, *, num_bins: int = 10, seed: int = 0) -> Calibration:
    """Returns how good the probabilities sigmoid(d) are. margins, labels: as for `hits`"""
    margins = margins.double()
    labels = torch.ones_like(margins) if labels is None else labels.double()
    sure = margins.abs().sigmoid()
    chance = error_by_chance(sure, num_bins=num_bins, seed=seed)
    return Calibration(
        log_loss=log_loss(margins, labels),
        brier=(margins.sigmoid() - labels).square().mean().item(),
        ece=calibration_error(reliability(sure, hits(margins, labels), num_bins=num_bins)),
        ece_by_chance=chance.mean().item(),
        ece_by_chance_high=chance.quantile(0.95).item(),
    )


def log_loss(margins: Tensor, labels: Tensor) -> float:
    """Returns the mean of -y log sigmoid(d) - (1 - y) log sigmoid(-d). margins, labels: (N,) float64"""
    return (-labels * F.logsigmoid(margins) - (1 - labels) * F.logsigmoid(-margins)).mean().item()


def reliability(predicted: Tensor, observed: Tensor, *, num_bins: int = 10) -> Reliability:
    """Returns predictions and what came, in bins of about equally many (`quantile_bins`), by the prediction.

    predicted: (N,) probabilities; observed: (N,) in [0, 1]
    Source: DeGroot and Fienberg, The Statistician 32 (1983) 12."""
    bins = quantile_bins(predicted, num_bins)
    return Reliability(
        [predicted[b].double().mean().item() for b in bins],
        [observed[b].double().mean().item() for b in bins],
        [len(b) for b in bins],
    )


def calibration_error(curve: Reliability) -> float:
    """Returns sum over bins of n_b / N |observed_b - predicted_b|.

    Source: Naeini et al., AAAI 2015; Guo et al., arXiv 1706.04599; on bins of equally many: Nixon et al.,
    arXiv 1904.01685."""
    gaps = zip(curve.counts, curve.observed, curve.predicted, strict=True)
    return sum(n * abs(o - p) for n, o, p in gaps) / sum(curve.counts)


def error_by_chance(predicted: Tensor, *, num_bins: int = 10, num_draws: int = 400, seed: int = 0) -> Tensor:
    """Returns the `calibration_error` (num_draws,) of outcomes drawn from the predictions themselves: what is left when
    every probability is right, for there are only N pairs, taken as independent. predicted: (N,) probabilities

    Source: "consistency resampling", Broecker and Smith, Weather and Forecasting 22 (2007) 651."""
    generator = torch.Generator().manual_seed(seed)
    predicted = predicted.double()
    errors = torch.zeros(num_draws, dtype=torch.float64)
    for rows in quantile_bins(predicted, num_bins):
        inside = predicted[rows].expand(num_draws, -1)
        drawn = torch.bernoulli(inside, generator=generator)
        errors += (drawn.sum(1) - inside.sum(1)).abs() / len(predicted)
    return errors


def fit_temperature(margins: Tensor, labels: Tensor | None = None) -> float:
    """Returns the T > 0 with the least `log_loss` of d / T: above 1 the scores are too sure, below 1 not sure enough.

    T lies within a factor of 1000 of the mean of |d|: at its upper end scores say nothing about labels or contradict
    them, at its lower end they are right about every pair. 1 where all scores are equal.

    margins, labels: as for `hits`
    Source: Guo et al., arXiv 1706.04599."""
    margins = margins.double()
    labels = torch.ones_like(margins) if labels is None else labels.double()
    scale = margins.abs().mean().item()
    if scale == 0:
        return 1.0
    low, high = scale / 1000, scale * 1000

    def slope(temperature: float) -> float:  # of the loss by 1 / T, in which it is convex
        return (((margins / temperature).sigmoid() - labels) * margins).mean().item()

    for _ in range(60):  # halves of a factor of a million
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low * high) ** 0.5


def cross_fit(
    margins: Tensor, labels: Tensor | None = None, *, clusters: Sequence[Hashable] | None = None
) -> tuple[Tensor, tuple[float, float]]:
    """Returns d / T (N,) float64, where T was fitted on the half of the prompts to which the pair does not belong, and
    the two T. Measures of the result are honest: no pair had a part in its own temperature.

    The halves are every other cluster, in order of appearance.
    Raises: ValueError for fewer than two clusters."""
    margins = margins.double()
    second = number(range(len(margins)) if clusters is None else clusters) % 2 == 1
    if not second.any():
        raise UserError("cross_fit: a temperature that is fitted on one half needs at least 2 prompts")
    fits = []
    for half in (~second, second):
        fits.append(fit_temperature(margins[half], None if labels is None else labels[half]))
    return torch.where(second, margins / fits[0], margins / fits[1]), (fits[0], fits[1])
