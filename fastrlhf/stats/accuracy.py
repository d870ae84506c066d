"""How often the scores agree with the labels, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrlhf.errors import UserError


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs, or other trials, that are right, with its 95 % interval.

    low, high: `wilson_interval` of the share in `effective_num` trials, 0 and 1 where there are none; ties: trials that
    are neither right nor wrong, of which each counts half; num: trials; num_clusters: prompts"""

    accuracy: float
    low: float
    high: float
    num: int
    ties: int
    num_clusters: int
    effective_num: float


def wilson_interval(share: float, num: float, z: float = 1.959964) -> tuple[float, float]:
    """Returns the ends of the confidence interval of a share observed in num trials; z = 1.96 for 95 %.

    (p + z^2/2n -+ z sqrt(p (1-p) / n + z^2/4n^2)) / (1 + z^2/n)

    Source: Wilson, Journal of the American Statistical Association 22 (1927) 209."""
    center, scale = share + z * z / (2 * num), 1 + z * z / num
    half = z * math.sqrt(max(share * (1 - share), 0.0) / num + z * z / (4 * num * num))
    return max((center - half) / scale, 0.0), min((center + half) / scale, 1.0)


def hits(margins: Tensor, labels: Tensor | None = None) -> Tensor:
    """Returns how far each pair's scores agree with its label (N,) float64: y where d > 0, 1 - y where d < 0, 1/2 where
    d = 0. margins: (N,) d; labels: (N,) y, default 1."""
    margins = margins.double()
    signs = (margins > 0).double() + 0.5 * (margins == 0).double()
    return signs if labels is None else labels.double() * signs + (1 - labels.double()) * (1 - signs)


def is_right(margins: Tensor, labels: Tensor | None = None) -> Tensor:
    """Returns whether each pair's scores agree with its label, (N,) float64: 1 where d and y - 1/2 have one sign, 0
    where they have not, 1/2 where d = 0; NaN where y = 1/2, as neither response is the better one. A pair that is
    written the other way round, with -d and 1 - y, is the same; a NaN stays. margins: (N,) d; labels: (N,) y, default
    1"""
    signs = torch.where(margins.isnan(), torch.nan, margins.double().sign())  # the sign of NaN is 0 to torch
    if labels is None:
        return 0.5 + 0.5 * signs
    sides = labels.double() - 0.5
    return torch.where(sides == 0, torch.nan, 0.5 + 0.5 * signs * sides.sign())


def accuracy(
    margins: Tensor,
    labels: Tensor | None = None,
    *,
    clusters: Sequence[Hashable] | None = None,
    weights: Tensor | None = None,
) -> Accuracy:
    """Returns the mean of `is_right`, with its interval. Pairs with a label of 1/2 are left out.

    margins, labels: as for `is_right`; clusters, weights: as for `share_of`

    Raises: ValueError for no pairs."""
    if not len(margins):
        raise UserError("accuracy: there are no pairs")
    kept = torch.ones_like(margins, dtype=torch.bool) if labels is None else labels != 0.5
    names = None if clusters is None else [n for n, keep in zip(clusters, kept.tolist(), strict=True) if keep]
    return accuracy_of_hits(is_right(margins, labels)[kept], names, None if weights is None else weights[kept])


def accuracy_of_hits(
    hits: Tensor, clusters: Sequence[Hashable] | None = None, weights: Tensor | None = None
) -> Accuracy:
    """Returns the share of trials that are right, with its interval. Every accuracy, here and in training, is one.

    hits: (N,) in [0, 1]; clusters: the prompt of each trial, default all different; weights: (N,) of trials in the
    mean, at least 0, default 1. A trial of weight 0 is as if it were not there. Without a trial nothing is known: 1/2,
    between 0 and 1."""
    names = list(range(len(hits)) if clusters is None else clusters)
    hits = hits.detach().cpu().double()
    if weights is not None:
        kept = weights.cpu() > 0
        names = [name for name, keep in zip(names, kept.tolist(), strict=True) if keep]
        hits, weights = hits[kept], weights.cpu()[kept].double()
    if not len(hits):
        return Accuracy(0.5, 0.0, 1.0, 0, 0, 0, 0.0)
    numbers = number(names)
    share = (hits.mean() if weights is None else (weights * hits).sum() / weights.sum()).item()
    effective = effective_num(hits, numbers, weights)
    low, high = wilson_interval(share, effective)
    return Accuracy(share, low, high, len(hits), int((hits == 0.5).sum()), int(numbers.max()) + 1, effective)


def effective_num(values: Tensor, clusters: Tensor, weights: Tensor | None = None) -> float:
    """Returns as many independent trials as are worth N trials in G clusters: 1 + (G - 1) / G p (1 - p) / V, at most
    what N independent ones are worth, K(w) = (sum of w)^2 / sum of w^2, which is N where all weigh the same.

    V = sum over clusters of (sum over the cluster of w (h - p))^2 / (sum of w)^2, p = sum of w h / sum of w. The mean
    takes one of G freedoms from V, so clusters of one trial are worth N, and one cluster is worth 1. Where all values
    are the same V says nothing, and the result is K of the clusters' mean weights: G where all weigh the same.

    values: (N,) h in [0, 1]; clusters: (N,) int64 from 0 up; weights: (N,) w above 0, default 1
    Source: the cluster-robust variance of a mean (Miller, arXiv 2411.00640); as a number of trials: Kish,
    "Survey Sampling" (1965), the design effect."""
    values, num_clusters = values.double(), int(clusters.max()) + 1
    weights = torch.ones_like(values) if weights is None else weights.double()

    def summed(each: Tensor) -> Tensor:
        return torch.zeros(num_clusters, dtype=torch.float64).index_add_(0, clusters, each)

    def kish(each: Tensor) -> float:
        return (each.sum().square() / each.square().sum()).item()

    if num_clusters == 1:
        return 1.0
    if values.min() == values.max():
        return kish(summed(weights) / summed(torch.ones_like(weights)))
    share = (weights * values).sum() / weights.sum()
    variance = summed(weights * (values - share)).square().sum() / weights.sum().square()
    return min(1 + (num_clusters - 1) / num_clusters * (share * (1 - share) / variance).item(), kish(weights))


def number(names: Sequence[Hashable] | range) -> Tensor:
    """Returns the number of each name, (N,) int64: 0 for the first that appears, and so on."""
    seen: dict[Hashable, int] = {}
    return torch.tensor([seen.setdefault(name, len(seen)) for name in names], dtype=torch.int64)


def quantile_bins(values: Tensor, num_bins: int) -> list[Tensor]:
    """Returns the rows of each bin, int64, in ascending order of the values: about equally many a bin; equal values are
    in one bin, so there may be fewer bins. values: (N,)"""
    order = values.argsort(stable=True)
    sorted_values = values[order]
    wanted = [len(values) * n // num_bins for n in range(1, num_bins)]
    # a cut moves down to where its value begins
    cuts = sorted({int((sorted_values < sorted_values[cut]).sum()) for cut in wanted if cut < len(values)} - {0})
    return list(order.tensor_split(cuts)) if len(values) else []
