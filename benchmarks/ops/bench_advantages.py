"""ppo_advantages, discounted_returns, group_advantages against plain torch: python -m benchmarks.ops.bench_advantages

The first two against the loop over time that trainers run on padded tensors, and `ppo_advantages` against our own ops
called one after the other too; the third against torch on equal groups, its best case.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Report, compare, expect_close
from fastrlhf import approx_kl, discounted_returns, gae, group_advantages, masked_whiten, ppo_advantages

KL_COEF, GAMMA, LAM = 0.05, 1.0, 0.95
Case = tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]  # a function and what it is called with


def loop_over_time(rewards: Tensor, values: Tensor) -> Tensor:
    """Advantages of padded (N, L): one step of L for all sequences at once."""
    advantages, following = [], torch.zeros(())
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        following = rewards[:, t] + GAMMA * next_values - values[:, t] + GAMMA * LAM * following
        advantages.append(following)
    return torch.stack(advantages[::-1], 1)


def ppo_padded(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    rewards = -KL_COEF * (logprobs - ref_logprobs)
    rewards[:, -1] += scores
    advantages = loop_over_time(rewards, values)
    white = (advantages - advantages.mean()) * (advantages.var(correction=0) + 1e-8).rsqrt()
    return rewards, white, advantages + values


def ppo_separate(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, ...]:
    rewards = -KL_COEF * approx_kl(logprobs, ref_logprobs)
    rewards = rewards.index_add(0, cu_seqlens[1:].long() - 1, scores)
    advantages, returns = gae(rewards, values, cu_seqlens, gamma=GAMMA, lam=LAM)
    return rewards, masked_whiten(advantages), returns


def returns_padded(rewards: Tensor) -> tuple[Tensor, ...]:
    returns, following = [], torch.zeros(())
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + 0.99 * following
        returns.append(following)
    return (torch.stack(returns[::-1], 1),)


def groups_torch(scores: Tensor) -> tuple[Tensor, ...]:
    return ((scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6),)


def table(report: Report, case: str, functions: dict[str, Case], bytes_moved: int) -> None:
    """Every function with its arguments; the last, on padded tensors in float64, says what is right."""
    function, args = list(functions.values())[-1]
    exact = function(*(x.double() for x in args))
    errors, calls = {}, {}
    for name, (function, args) in functions.items():
        pairs = zip(function(*args), exact, strict=True)
        errors[name] = max(expect_close(name, a.flatten(), e.flatten(), rtol=1e-4, atol=1e-3) for a, e in pairs)
        calls[name] = lambda function=function, args=args: function(*args)
    timings = compare(calls, seconds=report.options.seconds)
    ours = next(iter(timings))
    report.add(case, timings, error=errors, gb_s={ours: bytes_moved / timings[ours].median / 1e6})


def main() -> None:
    report = Report("advantages")
    for num, length in ((256, 128), (256, 1024)):
        logprobs, values, rewards = torch.randn(3, num, length)
        padded = torch.randn(num), logprobs, logprobs + 0.1 * torch.randn(num, length), values
        cu_seqlens = torch.arange(0, num * length + 1, length, dtype=torch.int32)
        flat = *(x.flatten() for x in padded), cu_seqlens
        functions: dict[str, Case] = {
            "fastrlhf": (lambda *args: ppo_advantages(*args, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM)[:3], flat),
            "fastrlhf, op by op": (ppo_separate, flat),
            "torch, loop over time": (ppo_padded, padded),
        }
        # read: three inputs, and the advantages to whiten; written: three outputs, and the whitened advantages
        table(report, f"ppo_advantages, {num} x {length}", functions, 32 * num * length)
        functions = {
            "fastrlhf": (lambda *args: (discounted_returns(*args, gamma=0.99),), (rewards.flatten(), cu_seqlens)),
            "torch, loop over time": (returns_padded, (rewards,)),
        }
        table(report, f"discounted_returns, {num} x {length}", functions, 8 * num * length)
    for num, size in ((64, 8), (4096, 16)):
        scores = torch.randn(num, size)
        cu_groups = torch.arange(0, num * size + 1, size, dtype=torch.int32)
        functions = {
            "fastrlhf": (lambda *args: (group_advantages(*args),), (scores.flatten(), cu_groups)),
            "torch": (groups_torch, (scores,)),
        }
        table(report, f"group_advantages, {num} groups of {size}", functions, 8 * num * size)
    report.finish()


if __name__ == "__main__":
    main()
