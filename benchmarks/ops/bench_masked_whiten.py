"""masked_whiten against plain torch and torch.compile."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.competitors import compiled
from fastrlhf import masked_whiten

SIZES = {"cpu": [(16,), (4096,), (64, 1024)], "cuda": [(64, 1024), (16777216,)], "tiny": [(3, 5)]}


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.randn(shape), torch.rand(shape) < 0.9


def by_torch(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    mean = torch.where(mask, x, 0).sum() / count
    variance = torch.where(mask, (x - mean).square(), 0).sum() / count
    return torch.where(mask, (x - mean) * (variance + 1e-8).rsqrt(), 0)


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    functions = {"fastrlhf": masked_whiten, "torch": by_torch, "torch.compile": compiled(by_torch)}
    for shape in sizes:
        yield Case(f"{'x'.join(map(str, shape))} tokens", functions, partial(inputs, shape), by_torch, atol=1e-4)
