"""From what is paid for responses to the advantage of every response token: with a value model, or without one.

kl (R,) below is the penalised KL of each token: 0 everywhere where the penalty is in the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf.ops import approx_kl, discounted_returns, gae, group_advantages, masked_whiten, ppo_advantages
from fastrlhf.ops.group_advantages import is_level
from fastrlhf.packing import Packed
from fastrlhf.settings.ppo import GROUPED, PPOConfig

GROUP_KINDS = {"rloo": "rloo", "dr_grpo": "dr_grpo", "reinforce++_baseline": "dr_grpo"}


def estimate_advantages(
    batch: Packed, scores: Tensor, config: PPOConfig, *, kl_coef: float, baseline: Tensor | None = None
) -> tuple[Packed, dict[str, Tensor]]:
    """Returns the batch with `advantages` (R,), with a value model `returns` (R,) too, and statistics.

    gae: r_t = -kl_coef kl_t, plus the score at the last token; generalised advantage estimation, whitened.
    reinforce++: the discounted sum of r from each token on, whitened.
    remax: the discounted sum of r from each token on, less the score of the greedy response.
    rloo, dr_grpo: S = score - kl_coef sum of kl, against the other responses to the prompt (`group_advantages`).
    grpo: the score against those, less kl_coef sum of kl less its mean: the KL is not divided by the deviation of the
    scores, which would blow it up where scores hardly differ.
    reinforce++_baseline: S less its mean over the responses to the prompt, whitened over all tokens.

    batch: fields logprobs, ref_logprobs and, for gae, values; the responses to one prompt are neighbours
    scores: (N,) what is paid for each response; baseline: (N,) that of the greedy response to its prompt, for remax

    The statistics are those of `ppo_advantages` as far as the estimator has them, and of groups `equal_groups`, the
    share of prompts whose responses all have the same score.
    Source: Schulman et al., arXiv 1506.02438 (gae); Hu et al., arXiv 2501.03262 (reinforce++); Li et al., arXiv
    2310.10505, equation 3 (remax); those of `group_advantages`."""
    kl = approx_kl(batch["logprobs"], batch["ref_logprobs"], estimator=config.kl_estimator)
    if config.kl_in == "loss":
        kl = torch.zeros_like(kl)
    if config.estimator == "gae" and not config.whiten_rewards:
        # the estimate that is taken off is k1 of (kl, 0), whatever the estimator
        _, advantages, returns, stats = ppo_advantages(
            scores,
            kl,
            torch.zeros_like(kl),
            batch["values"],
            batch.cu_responses,
            kl_coef=kl_coef,
            gamma=config.gamma,
            lam=config.lam,
            whiten=config.whiten,
        )
        return batch.with_fields(advantages=advantages, returns=returns), stats
    rewards = (-kl_coef * kl).index_add(0, batch.cu_responses[1:].long() - 1, scores)
    stats = {"rewards": rewards.sum() / batch.num_sequences}
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, center=False)
    if config.estimator == "gae":
        advantages, returns = gae(rewards, batch["values"], batch.cu_responses, gamma=config.gamma, lam=config.lam)
        spread = returns.var(correction=0)
        missed = torch.where(spread == 0, 1, (returns - batch["values"]).var(correction=0) / spread)
        stats |= {"values": batch["values"].mean(), "returns": returns.mean(), "explained_variance": 1 - missed}
        batch = batch.with_fields(returns=returns)
    elif config.estimator in GROUPED:
        advantages, stats["equal_groups"] = grouped(batch, scores, -kl_coef * kl, config)
    else:
        advantages = discounted_returns(rewards, batch.cu_responses, gamma=config.gamma)
        if baseline is not None:
            advantages = advantages - per_token(batch, baseline)
    stats |= {"advantages": advantages.mean(), "advantages_std": advantages.std(correction=0)}
    if config.whiten and config.estimator in ("gae", "reinforce++", "reinforce++_baseline"):
        advantages = masked_whiten(advantages)
    return batch.with_fields(advantages=advantages), stats


def grouped(batch: Packed, scores: Tensor, penalties: Tensor, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """The advantages (R,) of whole responses over the others to their prompt, given their scores (N,) and the rewards
    (R,) of their tokens for the KL; and the share of groups whose scores are equal."""
    scores, equal = level(scores, config.samples_per_prompt)
    lengths = batch.cu_responses.diff().long()
    penalty = torch.segment_reduce(penalties.double(), "sum", lengths=lengths, unsafe=True)
    bounds = torch.arange(0, batch.num_sequences + 1, config.samples_per_prompt, dtype=torch.int32).to(scores.device)
    if config.estimator == "grpo":
        advantages = group_advantages(scores, bounds, kind="grpo")
        advantages = advantages + group_advantages(penalty.to(scores.dtype), bounds, kind="dr_grpo")
    else:
        totals = (scores.double() + penalty).to(scores.dtype)
        advantages = group_advantages(totals, bounds, kind=GROUP_KINDS[config.estimator])
    return per_token(batch, advantages), equal.double().mean()


def level(scores: Tensor, samples_per_prompt: int) -> tuple[Tensor, Tensor]:
    """Returns scores (N,) that are equal where those of a group differ by rounding alone, which a deviation would
    blow up to advantages; and whether they are equal in each group (G,)."""
    groups = scores.view(-1, samples_per_prompt)
    wide = groups.double()
    deviations = wide.var(1, correction=min(samples_per_prompt - 1, 1)).sqrt()
    equal = is_level(deviations, wide.mean(1), scores.dtype)
    return torch.where(equal[:, None], groups[:, :1], groups).reshape(-1), equal


def per_token(batch: Packed, values: Tensor) -> Tensor:
    """A number a response (N,) at each of its tokens (R,)."""
    return values.repeat_interleave(batch.cu_responses.diff().long(), output_size=batch.num_responses)


def token_weights(batch: Packed, prompts: Tensor, config: PPOConfig) -> Tensor:
    """Returns weights (R,) that make a mean over the tokens of a minibatch the mean that `loss_mean` asks for.

    token: all 1. sequence: the mean over sequences of their tokens' mean. prompt: the mean over prompts of the mean
    over all tokens of their responses. max_length: the sum over tokens / (sequences x max_new_tokens).

    prompts: (R,) int64, a number for the prompt of each token

    Source: Schulman et al., arXiv 1707.06347 (token); Shao et al., arXiv 2402.03300 (sequence); Liu et al., arXiv
    2503.20783 (max_length)."""
    if config.loss_mean == "token":
        return torch.ones_like(prompts, dtype=torch.float32)
    if config.loss_mean == "prompt":
        _, place, counts = prompts.unique(return_inverse=True, return_counts=True)
        parts, sizes = len(counts), counts[place]
    else:
        parts = batch.num_sequences
        sizes = per_token(batch, batch.cu_responses.diff().long())
        if config.loss_mean == "max_length":
            sizes = torch.full_like(sizes, config.max_new_tokens)
    return batch.num_responses / (parts * sizes.float())
