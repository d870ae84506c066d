"""discounted_returns against the loop over time that trainers run on padded tensors."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, Prepared
from fastrlhf import discounted_returns

SIZES = {"cpu": [(256, 128), (256, 1024)], "cuda": [(512, 1024), (4096, 1024)], "tiny": [(3, 5)]}
GAMMA = 0.99


def packed(rewards: Tensor) -> tuple[Tensor, Tensor]:
    bounds = torch.arange(0, rewards.numel() + 1, rewards.shape[1], dtype=torch.int32, device=rewards.device)
    return rewards.flatten(), bounds


def loop_over_time(rewards: Tensor) -> Tensor:
    returns, following = [], 0.0
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + GAMMA * following
        returns.append(following)
    return torch.stack(returns[::-1], 1)


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    functions = {
        "fastrlhf": Prepared(packed, partial(discounted_returns, gamma=GAMMA)),
        "loop over time": loop_over_time,
    }
    for num, length in sizes:
        inputs, work = lambda n=num, m=length: (torch.randn(n, m),), {"gb_s": 8e-9 * num * length}
        yield Case(f"{num} x {length}", functions, inputs, loop_over_time, atol=1e-4, work=work)
