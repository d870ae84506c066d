"""Whether a mean that was measured again and again fell after its best.

The best of several points is above its true value by chance, so a fall from it is, too: under a flat truth 24 points
say so by more than two standard errors in every fifth case. Here half of the prompts choose the best point, the other
half measures the fall from it, and the other way round; and errors are those of differences on the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from fastrlhf.stats.means import Mean

LEVEL = 0.05
FEWEST = 6  # prompts; on fewer, scores that are 0 or 1 too often fall by the same amount on each by chance


class Falls:
    """Points of a curve that come one after the other, on the same prompts. `state` belongs to a checkpoint: how many
    there were, and the best so far by the prompts of even and of odd numbers."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"num": 0, "best": [{}, {}]}

    def add(self, values: Tensor) -> Mean:
        """Takes up a point, the values (P,) of the prompts; returns by how much their mean has fallen since the best
        point, this one among them. The error of fewer than two prompts is unknown."""
        values = values.detach().cpu().double()
        falls = torch.zeros_like(values)
        for n, best in enumerate(self.state["best"]):
            mean = (values[n::2] if len(values) > 1 else values).mean().item()
            if not best or mean > best["mean"]:
                best.update(mean=mean, values=values)
            falls[1 - n :: 2] = (best["values"] - values)[1 - n :: 2]
        self.state["num"] += 1
        return Mean.of(falls)

    def limit(self, fall: Mean) -> float:
        """Returns the largest fall at the newest point that chance explains; NaN for fewer than FEWEST prompts.

        Where the true mean stays the same, at most LEVEL of the curves ever exceed their limit, however many points
        are looked at: at the n-th point it is LEVEL / (n (n + 1)) of them."""
        num = self.state["num"]
        return math.nan if fall.num < FEWEST else t_quantile(LEVEL / (num * (num + 1)), fall.num - 1) * fall.error


def fall_after_best(points: Sequence[Tensor]) -> Mean:
    """Returns by how much the mean falls from the best of several points to the last. points: (P,) values of the
    prompts at each

    Source: splitting against the bias of what was chosen: Cox, Biometrika 62 (1975) 441."""
    falls = Falls()
    return [falls.add(values) for values in points][-1]


def t_quantile(level: float, freedoms: int) -> float:
    """Returns the number that Student's t exceeds with probability `level`, to 1 % where it is below 6 and there are at
    least 10 degrees of freedom.

    Source: its expansion, Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5."""
    z = -NormalDist().inv_cdf(level)
    if freedoms < 1:
        return math.nan
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedoms**n for n, term in enumerate(terms))
