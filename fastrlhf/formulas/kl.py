"""The coefficient of the KL penalty over a run: fixed, adapted to a target, or on its way to another value."""

from __future__ import annotations

from fastrlhf.settings.ppo import PPOConfig


def next_kl_coef(config: PPOConfig, kl_coef: float, kl: float, step: int) -> float:
    """Returns the coefficient of step 0, 1, ..., which is the next.

    kl_coef: that of the step before; kl: mean over its responses of the KL summed over a response, nats"""
    if config.kl_target is not None:
        return adapt_kl_coef(kl_coef, kl, target=config.kl_target, num_responses=config.batch_size)
    if config.kl_coef_end is not None:
        # not from the last one: a run that is extended goes on where it would be, had it always been so long
        return config.kl_coef * (config.kl_coef_end / config.kl_coef) ** (step / max(config.steps - 1, 1))
    return kl_coef


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, num_responses: int, horizon: float = 10_000) -> float:
    """Returns the next KL coefficient: it rises while the KL is above its target and falls while it is below.

    kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) num_responses / horizon)

    kl: mean over responses of the KL summed over a response, nats; target: the same quantity wanted
    horizon: number of responses over which the coefficient may change by a fifth

    Source: Ziegler et al., arXiv 1909.08593, section 2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / horizon)
