"""The coefficient of the KL penalty over a run: adapted to a target, or on its way to another value."""

from __future__ import annotations


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, num_responses: int, horizon: float = 10_000) -> float:
    """Returns the next KL coefficient: it rises while the KL is above its target and falls while it is below.

    kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) num_responses / horizon)

    kl: mean over responses of the KL summed over a response, nats; target: the same quantity wanted
    num_responses: in that mean; horizon: responses over which the coefficient may change by at most a fifth

    Source: Ziegler et al., arXiv 1909.08593, section 2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / horizon)


def planned_kl_coef(start: float, end: float, *, step: int, num_steps: int) -> float:
    """Returns the KL coefficient of step 0, 1, ... of num_steps: start, and by equal ratios end at the last step.

    start (end / start)^(step / (num_steps - 1)); both are above 0."""
    return start * (end / start) ** (step / max(num_steps - 1, 1))
