"""From the scores of responses to the rewards of tokens, and the coefficient of the KL penalty."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrlhf.ops.approx_kl import approx_kl


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


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, cu_responses: Tensor, *, kl_coef: float
) -> Tensor:
    """Returns the rewards (R,) of response tokens: -kl_coef k1, and the score at the last token of each response.

    k1 = logprobs - ref_logprobs is the penalty because its sum over a sampled response is an unbiased estimate of the
    KL divergence of the policy from the reference (see `approx_kl`).

    scores: (N,) float32
    logprobs, ref_logprobs: (R,) float32, of the sampled tokens under the policy that sampled them and the reference
    cu_responses: (N + 1,) int32, no response empty

    Source: Ziegler et al., arXiv 1909.08593, equation 2."""
    rewards = -kl_coef * approx_kl(logprobs, ref_logprobs, estimator="k1")
    return rewards.index_add(0, cu_responses[1:].long() - 1, scores.to(rewards.dtype))


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, num_responses: int, horizon: float = 10_000) -> float:
    """Returns the next KL coefficient: it rises while the KL is above its target and falls while it is below.

    kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) num_responses / horizon)

    kl: mean over responses of the KL summed over a response, nats; target: the same quantity wanted
    horizon: number of responses over which the coefficient may change by a fifth

    Source: Ziegler et al., arXiv 1909.08593, section 2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / horizon)
