"""From the scores of responses to the advantage of every response token: with a value model, or without one.

N responses have R tokens; response n is tokens cu_responses[n] to cu_responses[n + 1]. In all functions here:

scores: (N,) float32|float64, shaped score of each response; the responses to one prompt are neighbours
kl: (R,) like scores, estimated KL to the reference at each token, nats; zeros where the penalty is in the loss
cu_responses: (N + 1,) int32; no response is empty
kl_coef: weight of the KL penalty; gamma, lam: discount and trace decay, in [0, 1]
whiten: give the advantages mean 0 and variance 1 over all tokens
whiten_rewards: give the rewards variance 1 over all tokens, but leave their mean

Statistics are means over tokens, before whitening: advantages, advantages_std, and with a value model values, returns
and explained_variance, 1 - var(returns - values) / var(returns). rewards is summed over a response, and its mean over
responses. equal_groups is the share of prompts whose responses all have the same score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf.ops import discounted_returns, gae, group_advantages, masked_whiten, ppo_advantages
from fastrlhf.ops.group_advantages import is_level

Stats = dict[str, Tensor]


def token_rewards(scores: Tensor, kl: Tensor, cu_responses: Tensor, *, kl_coef: float) -> Tensor:
    """Returns r_t = -kl_coef kl_t, plus the score at the last token of its response; (R,).

    Source: Ziegler et al., arXiv 1909.08593, equation 2."""
    return (-kl_coef * kl).index_add(0, cu_responses[1:].long() - 1, scores)


def gae_advantages(
    scores: Tensor,
    kl: Tensor,
    cu_responses: Tensor,
    *,
    values: Tensor,
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten: bool,
    whiten_rewards: bool,
) -> tuple[Tensor, Tensor, Stats]:
    """Returns advantages (R,), returns (R,) and statistics of generalised advantage estimation on `token_rewards`.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns = A + V, not whitened.

    values: (R,) like scores, value V_t of the state before each token

    Source: Schulman et al., arXiv 1506.02438, equation 16."""
    if not whiten_rewards:  # one op; its penalty is the difference of two tensors, here kl and 0
        tokens = kl, torch.zeros_like(kl), values, cu_responses
        return ppo_advantages(scores, *tokens, kl_coef=kl_coef, gamma=gamma, lam=lam, whiten=whiten)[1:]
    rewards = token_rewards(scores, kl, cu_responses, kl_coef=kl_coef)
    whitened = masked_whiten(rewards, center=False)
    advantages, returns = gae(whitened, values, cu_responses, gamma=gamma, lam=lam)
    variance = returns.var(correction=0)
    unexplained = torch.where(variance == 0, 1, (returns - values).var(correction=0) / variance)
    stats = {"values": values.mean(), "returns": returns.mean(), "explained_variance": 1 - unexplained}
    stats |= statistics(rewards, advantages, len(scores))
    return masked_whiten(advantages) if whiten else advantages, returns, stats


def discounted_advantages(
    scores: Tensor,
    kl: Tensor,
    cu_responses: Tensor,
    *,
    kl_coef: float,
    gamma: float,
    whiten: bool,
    whiten_rewards: bool,
    baseline: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Returns advantages (R,), the sum of gamma^k r_{t+k} over the rest of the response, and statistics.

    baseline: (N,) like scores, taken off: for ReMax the score of the greedy response to the same prompt

    Source: Hu et al., arXiv 2501.03262 (REINFORCE++); Li et al., arXiv 2310.10505, equation 3 (ReMax)."""
    rewards = token_rewards(scores, kl, cu_responses, kl_coef=kl_coef)
    whitened = masked_whiten(rewards, center=False) if whiten_rewards else rewards
    advantages = discounted_returns(whitened, cu_responses, gamma=gamma)
    if baseline is not None:
        advantages = advantages - per_token(baseline, cu_responses, len(kl))
    stats = statistics(rewards, advantages, len(scores))
    return masked_whiten(advantages) if whiten else advantages, stats


def grouped_advantages(
    scores: Tensor,
    kl: Tensor,
    cu_responses: Tensor,
    *,
    estimator: str,
    samples_per_prompt: int,
    kl_coef: float,
    whiten: bool,
) -> tuple[Tensor, Stats]:
    """Returns advantages (R,), the same at each token of a response, over the other responses to its prompt; and
    statistics.

    With the penalty p = -kl_coef sum_t kl_t of a response, its total S = score + p, and means over its group:
    rloo: S - mean of the S of the others. dr_grpo, reinforce++_baseline: S - mean S.
    grpo: (score - mean score) / std score + p - mean p: the KL is not divided by the deviation of the scores, which
    would blow it up where scores hardly differ.

    samples_per_prompt: so many neighbours are a group; scores in it that differ by rounding alone count as equal

    Raises: ValueError for another estimator.
    Source: Hu et al., arXiv 2501.03262 (reinforce++_baseline); for the others see `group_advantages`."""
    rewards = token_rewards(scores, kl, cu_responses, kl_coef=kl_coef)
    scores, equal = equalize(scores, samples_per_prompt)
    lengths, kind = cu_responses.diff().long(), "dr_grpo" if estimator == "reinforce++_baseline" else estimator
    penalty = torch.segment_reduce((-kl_coef * kl).double(), "sum", lengths=lengths, unsafe=True)
    groups = torch.arange(0, len(scores) + 1, samples_per_prompt, dtype=torch.int32).to(scores.device)
    if kind == "grpo":
        advantages = group_advantages(scores, groups, kind="grpo")
        advantages = advantages + group_advantages(penalty.to(scores.dtype), groups, kind="dr_grpo")
    else:
        advantages = group_advantages((scores.double() + penalty).to(scores.dtype), groups, kind=kind)
    advantages = per_token(advantages, cu_responses, len(kl))
    stats = {"equal_groups": equal.double().mean(), **statistics(rewards, advantages, len(scores))}
    return masked_whiten(advantages) if whiten else advantages, stats


def statistics(rewards: Tensor, advantages: Tensor, num_responses: int) -> Stats:
    return {
        "rewards": rewards.sum() / num_responses,
        "advantages": advantages.mean(),
        "advantages_std": advantages.std(correction=0),
    }


def equalize(scores: Tensor, samples_per_prompt: int) -> tuple[Tensor, Tensor]:
    """Returns scores (N,) that are exactly equal where those of a group differ by rounding alone, which division by
    their deviation would blow up; and whether they are equal in each group (G,)."""
    groups = scores.view(-1, samples_per_prompt)
    wide = groups.double()
    deviations = wide.var(1, correction=min(samples_per_prompt - 1, 1)).sqrt()
    equal = is_level(deviations, wide.mean(1), scores.dtype)
    return torch.where(equal[:, None], groups[:, :1], groups).reshape(-1), equal


def per_token(values: Tensor, cu_responses: Tensor, num_tokens: int) -> Tensor:
    """Returns a number of each response (N,) at each of its tokens (R,); num_tokens: R, known without a wait for a
    GPU."""
    return values.repeat_interleave(cu_responses.diff().long(), output_size=num_tokens)


def token_weights(
    cu_responses: Tensor, prompts: Tensor, *, loss_mean: str, max_new_tokens: int | None = None
) -> Tensor:
    """Returns weights (R,) float32 that make a mean over the tokens of a minibatch the mean that `loss_mean` asks for.

    token: all 1. sequence: the mean over sequences of their tokens' mean. prompt: the mean over prompts of the mean
    over all tokens of their responses. max_length: the sum over tokens / (sequences x max_new_tokens).

    prompts: (R,) int64, a number for the prompt of each token; max_new_tokens: for max_length

    Raises: ValueError for another loss_mean, and for max_length without max_new_tokens.
    Source: Schulman et al., arXiv 1707.06347 (token); Shao et al., arXiv 2402.03300 (sequence); Liu et al., arXiv
    2503.20783 (max_length)."""
    num_tokens, num_parts = len(prompts), len(cu_responses) - 1
    if loss_mean == "token":
        return torch.ones_like(prompts, dtype=torch.float32)
    if loss_mean == "prompt":
        _, place, counts = prompts.unique(return_inverse=True, return_counts=True)
        num_parts, sizes = len(counts), counts[place]
    elif loss_mean == "sequence":
        sizes = per_token(cu_responses.diff().long(), cu_responses, num_tokens)
    elif loss_mean == "max_length" and max_new_tokens is not None:
        sizes = torch.full_like(prompts, max_new_tokens)
    else:
        raise ValueError(f"token_weights: no mean {loss_mean!r}, or its max_new_tokens are missing")
    return num_tokens / (num_parts * sizes.float())
