"""The scores of responses that did not end, and the coefficient of the KL penalty."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def apply_missing_eos(scores: Tensor, finished: Tensor, rule: str) -> Tensor:
    """Returns the scores (N,) after the rule for responses that were cut off before they ended.

    scores: (N,) float32
    finished: (N,) bool, True where the response ended by itself
    rule: "none"; "subtract:V" takes V off the score; "replace:V" makes it V

    Raises: ValueError for another rule.
    Source: subtract is that of TRL, replace that of Stiennon et al., arXiv 2009.01325."""
    kind, value = parse_missing_eos(rule)
    if kind == "subtract":
        return torch.where(finished, scores, scores - value)
    if kind == "replace":
        return torch.where(finished, scores, torch.full_like(scores, value))
    return scores


def parse_missing_eos(rule: str) -> tuple[str, float]:
    """Returns ("none" | "subtract" | "replace", V) of a rule such as "subtract:1.0"."""
    kind, _, value = rule.partition(":")
    if rule == "none":
        return "none", 0.0
    if kind in ("subtract", "replace"):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return kind, number
    raise ValueError(f"missing_eos: expected none, subtract:V or replace:V with a number V, got {rule!r}")


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, num_responses: int, horizon: float = 10_000) -> float:
    """Returns the next KL coefficient: it rises while the KL is above its target and falls while it is below.

    kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) num_responses / horizon)

    kl: mean over responses of the KL summed over a response, nats; target: the same quantity wanted
    horizon: number of responses over which the coefficient may change by a fifth

    Source: Ziegler et al., arXiv 1909.08593, section 2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / horizon)
