"""value_loss, its statistics included, against plain torch, torch.compile and verl's loss."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.competitors import compiled, find
from fastrlhf import value_loss

SIZES = {"cpu": [(16,), (4096,), (64, 1024)], "cuda": [(64, 1024), (4194304,)], "tiny": [(3, 5)]}
Outputs = tuple[Tensor, ...]


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    old = torch.randn(shape)
    return old + 0.2 * torch.randn(shape), old, torch.randn(shape), torch.rand(shape) < 0.9


def ours(*inputs: Tensor) -> Outputs:
    loss, stats = value_loss(*inputs)
    return loss, *stats.values()


def by_torch(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Outputs:
    count = mask.sum()
    bounded = values.clamp(old_values - 0.2, old_values + 0.2)
    plain, clipped = (values - returns).square(), (bounded - returns).square()
    loss = torch.where(mask, torch.maximum(plain, clipped), 0).sum() / (2 * count)
    with torch.no_grad():
        return loss, ((clipped > plain) & mask).sum() / count, torch.where(mask, plain, 0).sum() / count


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    verl = find("verl.trainer.ppo.core_algos")

    def by_verl(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Outputs:
        return verl.compute_value_loss(values, returns, old_values, mask, 0.2)[:1]

    functions = {"fastrlhf": ours, "torch": by_torch, "torch.compile": compiled(by_torch)}
    functions |= {"verl": by_verl} if verl else {}
    for grads, what in (((), "forward"), ((0,), "forward + backward")):
        for shape in sizes:
            name = f"{'x'.join(map(str, shape))} tokens, {what}"
            yield Case(name, functions, partial(inputs, shape), by_torch, grads, atol=1e-4)
