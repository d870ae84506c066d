"""Whether scores follow something that they should not, such as length."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pearson(x: Tensor, y: Tensor) -> float:
    """Returns sum (x - mean x)(y - mean y) / sqrt(sum (x - mean x)^2 sum (y - mean y)^2); NaN where one is constant.

    x, y: (N,). Source: Pearson, Proceedings of the Royal Society 58 (1895) 240."""
    return cosine(x.double() - x.double().mean(), y.double() - y.double().mean())


def spearman(x: Tensor, y: Tensor) -> float:
    """Returns `pearson` of the ranks, equal values sharing the mean of theirs.

    x, y: (N,). Source: Spearman, American Journal of Psychology 15 (1904) 72."""
    return pearson(ranks(x), ranks(y))


def paired_pearson(x: Tensor, y: Tensor) -> float:
    """Returns sum x y / sqrt(sum x^2 sum y^2), of differences within pairs: `pearson` of the pairs in both orders, so
    that it does not matter which response of a pair is taken off the other. x, y: (N,)"""
    return cosine(x.double(), y.double())


def paired_spearman(x: Tensor, y: Tensor) -> float:
    """Returns `spearman` of differences within pairs, in both orders. x, y: (N,)"""
    return spearman(torch.cat([x, -x]), torch.cat([y, -y]))


def cosine(x: Tensor, y: Tensor) -> float:
    """Returns sum x y / sqrt(sum x^2 sum y^2), NaN for 0 / 0. x, y: (N,) float64"""
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return (x.mul(y).sum() / scale).clamp(-1, 1).item() if scale > 0 else math.nan


def ranks(values: Tensor) -> Tensor:
    """Returns the rank (N,) float64 of each value, from 1 up; equal values share the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def correlation_interval(r: float, num: int, *, by_rank: bool = False, z: float = 1.959964) -> tuple[float, float]:
    """Returns the ends of the 95 % interval of a correlation of num independent rows: tanh(atanh r -+ z s),
    s = 1 / sqrt(N - 3), and sqrt(1 + r^2 / 2) times that by rank. NaN where r is, -1 and 1 for N < 4.

    Source: Fisher, Metron 1 (1921) 3; by rank: Bonett and Wright, Psychometrika 65 (2000) 23."""
    if math.isnan(r):
        return math.nan, math.nan
    if num < 4:
        return -1.0, 1.0
    if abs(r) == 1:
        return r, r
    error = math.sqrt((1 + r * r / 2 if by_rank else 1) / (num - 3))
    return math.tanh(math.atanh(r) - z * error), math.tanh(math.atanh(r) + z * error)
