"""pairwise_reward_loss with centring, its statistics included, against plain torch and torch.compile."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case
from benchmarks.competitors import compiled
from fastrlhf import pairwise_reward_loss

SIZES = {"cpu": [(16,), (64,), (4096,)], "cuda": [(64,), (65536,)], "tiny": [(3,)]}
Outputs = tuple[Tensor, ...]


def inputs(size: int) -> Outputs:
    return torch.randn(2, size).unbind()


def ours(chosen: Tensor, rejected: Tensor) -> Outputs:
    loss, stats = pairwise_reward_loss(chosen, rejected, center_coef=0.01)
    return loss, *stats.values()


def by_torch(chosen: Tensor, rejected: Tensor) -> Outputs:
    loss = -F.logsigmoid(chosen - rejected).mean() + 0.01 * (chosen + rejected).square().mean()
    with torch.no_grad():
        accuracy = (chosen > rejected).to(loss.dtype).mean() + 0.5 * (chosen == rejected).to(loss.dtype).mean()
        return loss, accuracy, (chosen - rejected).mean(), chosen.mean(), rejected.mean()


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    functions = {"fastrlhf": ours, "torch": by_torch, "torch.compile": compiled(by_torch)}
    for grads, what in (((), "forward"), ((0, 1), "forward + backward")):
        for (size,) in sizes:
            yield Case(f"{size} pairs, {what}", functions, partial(inputs, size), by_torch, grads)
