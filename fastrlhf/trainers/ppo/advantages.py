"""The formulas between the scores of a step and its advantages, with the numbers of a PPOConfig."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf.formulas.advantages import discounted_advantages, gae_advantages, grouped_advantages
from fastrlhf.formulas.kl import adapt_kl_coef, planned_kl_coef
from fastrlhf.ops import approx_kl
from fastrlhf.packing import Packed
from fastrlhf.rewards.shaping import RunningMoments, shape_scores
from fastrlhf.settings.ppo import GROUPED, PPOConfig, parse_missing_eos


def shaped_scores(
    config: PPOConfig, scores: Tensor, lengths: Tensor, finished: Tensor, moments: RunningMoments
) -> Tensor:
    """The shaped scores (N,) of responses."""
    return shape_scores(
        scores,
        lengths,
        finished,
        moments=moments,
        score_norm=config.score_norm,
        score_clip=config.score_clip,
        missing_eos=parse_missing_eos(config.missing_eos),
        min_response_tokens=config.min_response_tokens,
        length_penalty=config.length_penalty,
        overlong_tokens=config.overlong_tokens,
        overlong_penalty=config.overlong_penalty,
        max_new_tokens=config.max_new_tokens,
    )


def with_advantages(
    config: PPOConfig, batch: Packed, scores: Tensor, *, kl_coef: float, baseline: Tensor | None = None
) -> tuple[Packed, dict[str, Tensor]]:
    """Returns the batch with `advantages` (R,), with a value model `returns` (R,) too; and statistics.

    batch: fields logprobs, ref_logprobs and, for gae, values
    scores: (N,) shaped scores; baseline: (N,) those of the greedy responses, for remax"""
    kl = approx_kl(batch["logprobs"], batch["ref_logprobs"], estimator=config.kl_estimator)
    if config.kl_in == "loss":
        kl = torch.zeros_like(kl)
    if config.estimator == "gae":
        advantages, returns, stats = gae_advantages(
            scores,
            kl,
            batch.cu_responses,
            values=batch["values"],
            kl_coef=kl_coef,
            gamma=config.gamma,
            lam=config.lam,
            whiten=config.whiten,
            whiten_rewards=config.whiten_rewards,
        )
        return batch.with_fields(advantages=advantages, returns=returns), stats
    if config.estimator in GROUPED:
        advantages, stats = grouped_advantages(
            scores,
            kl,
            batch.cu_responses,
            estimator=config.estimator,
            samples_per_prompt=config.samples_per_prompt,
            kl_coef=kl_coef,
            whiten=config.whiten and config.estimator == "reinforce++_baseline",
        )
    else:
        advantages, stats = discounted_advantages(
            scores,
            kl,
            batch.cu_responses,
            baseline=baseline,
            kl_coef=kl_coef,
            gamma=config.gamma,
            whiten=config.whiten and config.estimator == "reinforce++",
            whiten_rewards=config.whiten_rewards,
        )
    return batch.with_fields(advantages=advantages), stats


def next_kl_coef(config: PPOConfig, kl_coef: float, kl: float, step: int) -> float:
    """The KL coefficient of step 0, 1, ..., which is the next.

    kl_coef: of the step before; kl: mean over its responses of the KL summed over a response, nats"""
    if config.kl_target is not None:
        return adapt_kl_coef(kl_coef, kl, target=config.kl_target, num_responses=config.batch_size)
    if config.kl_coef_end is not None:
        # not from kl_coef: a run that is extended goes on where it would be, had it always been so long
        return planned_kl_coef(config.kl_coef, config.kl_coef_end, step=step, num_steps=config.steps)
    return kl_coef
