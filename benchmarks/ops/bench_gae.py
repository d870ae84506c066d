"""gae against the loop over time that PPO trainers run: python -m benchmarks.ops.bench_gae

A million tokens, then 256 sequences of 1024, as the loop likes it, then ragged responses, which it pads to the longest.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, compare, expect_close
from fastrlhf import gae

GAMMA, LAM = 1.0, 0.95


def loop_over_time(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Padded (N, L): one step of L for all sequences at once."""
    advantages, following = [], torch.zeros(())
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + GAMMA * next_values - values[:, t]
        following = delta + GAMMA * LAM * following
        advantages.append(following)
    stacked = torch.stack(advantages[::-1], 1)
    return stacked, stacked + values


def masked_loop_over_time(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the mask is 0, what follows is carried through."""
    advantages, following, next_values = [], torch.zeros(len(rewards)), torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_values - values[:, t]
        following = torch.where(mask[:, t], delta + GAMMA * LAM * following, following)
        next_values = torch.where(mask[:, t], values[:, t], next_values)
        advantages.append(following)
    stacked = torch.stack(advantages[::-1], 1)
    return torch.where(mask, stacked, 0), torch.where(mask, stacked + values, 0)


def table(
    report: Report,
    case: str,
    packed: tuple[Tensor, Tensor, Tensor, Tensor | None],
    loop: Callable[..., tuple[Tensor, Tensor]],
    padded: tuple[Tensor, ...],
    inside: Tensor,
) -> None:
    """Ours on the packed tokens against `loop` on the padded ones; `inside` says where the padded tokens are real."""
    rewards, values, cu_seqlens, mask = packed
    exact = loop(*(x.double() if x.is_floating_point() else x for x in padded))

    def ours() -> tuple[Tensor, Tensor]:
        return gae(rewards, values, cu_seqlens, mask=mask, gamma=GAMMA, lam=LAM)

    for actual, padded_exact in zip(ours(), exact, strict=True):
        error = expect_close("fastrlhf", actual, padded_exact[inside], atol=1e-4)
    functions = {"fastrlhf": ours, "loop over time": lambda: loop(*padded)}
    timings = compare(functions, seconds=report.options.seconds)
    rate = len(rewards) * (16 if mask is None else 17) / timings["fastrlhf"].median / 1e6
    report.add(case, timings, error={"fastrlhf": error}, gb_s={"fastrlhf": rate})


def main() -> None:
    report = Report("gae")
    rewards, values = torch.randn(2, 1024, 1024)
    cu_seqlens = torch.arange(0, rewards.numel() + 1, 1024, dtype=torch.int32)
    million = rewards.flatten(), values.flatten(), cu_seqlens, None
    table(report, "1024 x 1024", million, loop_over_time, (rewards, values), torch.ones_like(rewards, dtype=torch.bool))

    rewards, values, mask = torch.randn(256, 1024), torch.randn(256, 1024), torch.rand(256, 1024) < 0.9
    cu_seqlens = torch.arange(0, rewards.numel() + 1, 1024, dtype=torch.int32)
    flat, everything = (rewards.flatten(), values.flatten(), cu_seqlens), torch.ones_like(mask)
    table(report, "256 x 1024", (*flat, None), loop_over_time, (rewards, values), everything)
    masked = (*flat, mask.flatten())
    table(report, "256 x 1024, mask", masked, masked_loop_over_time, (rewards, values, mask), everything)

    lengths = torch.distributions.LogNormal(4.5, 0.8).sample((256,)).clamp(4, 1024).int()
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    rewards, values = torch.randn(inside.shape) * inside, torch.randn(inside.shape) * inside
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    packed = rewards[inside], values[inside], cu_seqlens, None
    case = f"256 responses, {int(lengths.min())} to {int(lengths.max())} tokens"
    table(report, case, packed, loop_over_time, (rewards, values), inside)
    report.finish()


if __name__ == "__main__":
    main()
