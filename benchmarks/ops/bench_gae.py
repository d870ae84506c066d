"""gae against the loop over time that PPO trainers run: python -m benchmarks.ops.bench_gae

Sequences of one length, as the loop likes them, with and without a mask; then ragged responses, which it pads to the
longest. On a GPU also as a graph replays it: the kernel without what Python takes to start it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, captured, compare, expect_close
from fastrlhf import gae

GAMMA, LAM = 1.0, 0.95
SIZES = {
    "cpu": [(1024, 1024), (256, 1024)],
    "cuda": [(64, 1024), (512, 1024), (4096, 1024), (512, 4096), (8192, 4096)],
    "tiny": [(3, 8)],
}


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
    if rewards.is_cuda:
        functions["fastrlhf, as a graph"] = captured(ours)
    timings = compare(functions, seconds=report.options.seconds)
    moved = len(rewards) * (16 if mask is None else 17)
    rates = {name: moved / timing.median / 1e6 for name, timing in timings.items() if "fastrlhf" in name}
    report.add(case, timings, error={"fastrlhf": error}, gb_s=rates)


def same_length(report: Report, num: int, length: int) -> None:
    rewards, values, mask = torch.randn(num, length), torch.randn(num, length), torch.rand(num, length) < 0.9
    cu_seqlens = torch.arange(0, num * length + 1, length, dtype=torch.int32)
    flat, everything = (rewards.flatten(), values.flatten(), cu_seqlens), torch.ones_like(mask)
    case = f"{num} x {length}"
    table(report, case, (*flat, None), loop_over_time, (rewards, values), everything)
    masked = (*flat, mask.flatten())
    table(report, f"{case}, mask", masked, masked_loop_over_time, (rewards, values, mask), everything)


def ragged(report: Report, num: int, length: int) -> None:
    lengths = (torch.randn(num) * 0.8 + 4.5).exp().clamp(4, length).int()
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    rewards, values = torch.randn(inside.shape) * inside, torch.randn(inside.shape) * inside
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    packed = rewards[inside], values[inside], cu_seqlens, None
    case = f"{num} responses, {int(lengths.min())} to {int(lengths.max())} tokens"
    table(report, case, packed, loop_over_time, (rewards, values), inside)


def main() -> None:
    report = Report("gae", SIZES)
    for num, length in report.sizes:
        same_length(report, num, length)
    ragged(report, 4 if report.options.tiny else 256, 1024)
    report.finish()


if __name__ == "__main__":
    main()
