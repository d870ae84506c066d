"""gae against the loop over time that PPO trainers run.

Sequences of one length, as the loop likes them, with and without a mask; then ragged responses, which it pads to the
longest.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Prepared
from fastrlhf import gae

SIZES = {
    "cpu": [(1024, 1024), (256, 1024)],
    "cuda": [(64, 1024), (512, 1024), (4096, 1024), (512, 4096), (8192, 4096)],
    "tiny": [(3, 8)],
}
GAMMA, LAM = 1.0, 0.95


def loop_over_time(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Padded (N, L): one step of L for all sequences at once."""
    advantages, following = [], 0.0
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + GAMMA * next_values - values[:, t]
        following = delta + GAMMA * LAM * following
        advantages.append(following)
    stacked = torch.stack(advantages[::-1], 1)
    return stacked, stacked + values


def masked_loop_over_time(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the mask is 0, what follows is carried through."""
    advantages, following, next_values = [], torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_values - values[:, t]
        following = torch.where(mask[:, t], delta + GAMMA * LAM * following, following)
        next_values = torch.where(mask[:, t], values[:, t], next_values)
        advantages.append(following)
    stacked = torch.stack(advantages[::-1], 1)
    return torch.where(mask, stacked, 0), torch.where(mask, stacked + values, 0)


def packed(rewards: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """What `gae` takes of padded sequences of one length."""
    cu_seqlens = torch.arange(0, rewards.numel() + 1, rewards.shape[1], dtype=torch.int32, device=rewards.device)
    return rewards.flatten(), values.flatten(), cu_seqlens, None if mask is None else mask.flatten()


def ours(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return gae(rewards, values, cu_seqlens, mask=mask, gamma=GAMMA, lam=LAM)


def dense(num: int, length: int) -> tuple[Tensor, ...]:
    return torch.randn(2, num, length).unbind()


def holed(num: int, length: int) -> tuple[Tensor, ...]:
    return *dense(num, length), torch.rand(num, length) < 0.9


def ragged(num: int) -> Case:
    """Responses of log-normal lengths."""
    quantiles = torch.linspace(0.5 / num, 1 - 0.5 / num, num)[torch.randperm(num)]
    lengths = torch.distributions.LogNormal(4.5, 0.8).icdf(quantiles).clamp(4, 1024).int()
    inside = torch.arange(int(lengths.max())) < lengths[:, None]

    def inputs() -> tuple[Tensor, ...]:
        here = torch.get_default_device()
        return *(torch.randn(2, *inside.shape) * inside.to(here)), inside.to(here)

    def joined(rewards: Tensor, values: Tensor, inside: Tensor) -> tuple[Tensor | None, ...]:
        cu_seqlens = F.pad(inside.sum(1).cumsum(0), (1, 0)).int()
        return rewards[inside], values[inside], cu_seqlens, None

    loop = Prepared(lambda *inputs: inputs[:2], loop_over_time, lambda *xs: tuple(x[inside.to(x.device)] for x in xs))
    functions = {"fastrlhf": Prepared(joined, ours), "loop over time": loop}
    work = {"gb_s": 16e-9 * int(lengths.sum())}
    case = f"{num} responses, {int(lengths.min())} to {int(lengths.max())} tokens"
    return Case(case, functions, inputs, loop, atol=1e-4, work=work)


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    for shape in sizes:
        text, size = "{} x {}".format(*shape), math.prod(shape)
        for made, loop, what in ((dense, loop_over_time, ""), (holed, masked_loop_over_time, ", mask")):
            functions = {"fastrlhf": Prepared(packed, ours), "loop over time": loop}
            work = {"gb_s": (17 if what else 16) * 1e-9 * size}
            yield Case(text + what, functions, partial(made, *shape), loop, atol=1e-4, work=work)
    yield ragged(4 if sizes == SIZES["tiny"] else 256)
