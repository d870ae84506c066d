"""approx_kl, its estimator k3, against plain torch, torch.compile and verl's."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.competitors import compiled, find
from fastrlhf import approx_kl

SIZES = {"cpu": [(16,), (4096,), (64, 1024)], "cuda": [(64, 1024), (4194304,)], "tiny": [(3, 5)]}


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    reference = torch.randn(shape) - 3
    return reference + 0.2 * torch.randn(shape), reference


def ours(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return approx_kl(logprobs, ref_logprobs, estimator="k3")


def by_torch(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    r = ref_logprobs - logprobs
    return r.exp() - 1 - r


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    verl = find("verl.trainer.ppo.core_algos")
    functions = {"fastrlhf": ours, "torch": by_torch, "torch.compile": compiled(by_torch)}
    functions |= {"verl": partial(verl.kl_penalty, kl_penalty="k3")} if verl else {}
    for shape in sizes:
        yield Case(f"k3, {'x'.join(map(str, shape))} tokens", functions, partial(inputs, shape), by_torch)
