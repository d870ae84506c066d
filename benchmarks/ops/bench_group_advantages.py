"""group_advantages against torch on equal groups, its best case."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import Case, Prepared
from benchmarks.competitors import compiled
from fastrlhf import group_advantages

SIZES = {"cpu": [(64, 8), (4096, 16)], "cuda": [(512, 8), (4096, 16)], "tiny": [(2, 3)]}


def packed(scores: Tensor) -> tuple[Tensor, Tensor]:
    bounds = torch.arange(0, scores.numel() + 1, scores.shape[1], dtype=torch.int32, device=scores.device)
    return scores.flatten(), bounds


def by_torch(scores: Tensor) -> Tensor:
    return (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6)


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    functions = {
        "fastrlhf": Prepared(packed, group_advantages),
        "torch": by_torch,
        "torch.compile": compiled(by_torch),
    }
    for num, size in sizes:
        inputs, work = lambda n=num, m=size: (torch.randn(n, m),), {"gb_s": 8e-9 * num * size}
        yield Case(f"{num} groups of {size}", functions, inputs, by_torch, work=work)
