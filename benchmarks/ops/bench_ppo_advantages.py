"""ppo_advantages against our own ops one after another, and the loop over time that trainers run on padded tensors."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, Prepared
from fastrlhf import approx_kl, gae, masked_whiten, ppo_advantages

SIZES = {"cpu": [(256, 128), (256, 1024)], "cuda": [(512, 1024), (4096, 1024)], "tiny": [(3, 5)]}
KL_COEF, GAMMA, LAM = 0.05, 1.0, 0.95
Outputs = tuple[Tensor, ...]


def inputs(num: int, length: int) -> Outputs:
    """Scores (N,), then log-probabilities, those of the reference and values, padded."""
    logprobs, step, values = torch.randn(3, num, length)
    return torch.randn(num), logprobs, logprobs + 0.1 * step, values


def packed(scores: Tensor, *rest: Tensor) -> Outputs:
    num, length = rest[0].shape
    cu_seqlens = torch.arange(0, num * length + 1, length, dtype=torch.int32, device=scores.device)
    return scores, *(x.flatten() for x in rest), cu_seqlens


def ours(*args: Tensor) -> Outputs:
    return ppo_advantages(*args, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM)[:3]


def op_by_op(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, cu_seqlens: Tensor) -> Outputs:
    rewards = -KL_COEF * approx_kl(logprobs, ref_logprobs)
    rewards = rewards.index_add(0, cu_seqlens[1:].long() - 1, scores)
    advantages, returns = gae(rewards, values, cu_seqlens, gamma=GAMMA, lam=LAM)
    return rewards, masked_whiten(advantages), returns


def loop_over_time(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor) -> Outputs:
    rewards = -KL_COEF * (logprobs - ref_logprobs)
    rewards[:, -1] += scores
    columns, following = [], 0.0
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        following = rewards[:, t] + GAMMA * next_values - values[:, t] + GAMMA * LAM * following
        columns.append(following)
    advantages = torch.stack(columns[::-1], 1)
    white = (advantages - advantages.mean()) * (advantages.var(correction=0) + 1e-8).rsqrt()
    return rewards, white, advantages + values


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    functions = {
        "fastrlhf": Prepared(packed, ours),
        "fastrlhf, op by op": Prepared(packed, op_by_op),
        "loop over time": loop_over_time,
    }
    for num, length in sizes:
        # read: three inputs, and the advantages to whiten; written: three outputs, and the whitened advantages
        work = {"gb_s": 32e-9 * num * length}
        name, made = f"{num} x {length}", partial(inputs, num, length)
        yield Case(name, functions, made, loop_over_time, atol=1e-3, work=work)
