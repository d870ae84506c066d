"""rms_norm against torch's, torch.compile and the norm of transformers' Llama."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case
from benchmarks.competitors import compiled
from fastrlhf import rms_norm

SIZES = {"cpu": [(16, 256), (686, 256), (2048, 2048)], "cuda": [(8192, 576), (8192, 4096)], "tiny": [(3, 5)]}
EPS = 1e-6


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.randn(shape).to(dtype), (1 + 0.1 * torch.randn(shape[1])).to(dtype)


def by_torch(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(hidden, weight.shape, weight, EPS)


def by_transformers(hidden: Tensor, weight: Tensor) -> Tensor:
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(hidden.dtype)


def cases(sizes: list[tuple[int, int]], device: str) -> Iterator[Case]:
    dtype, near = (torch.bfloat16, 0.1) if device == "cuda" else (torch.float32, 1e-4)
    functions = {"fastrlhf": partial(rms_norm, eps=EPS), "torch": by_torch, "transformers": by_transformers}
    functions["torch.compile"] = compiled(by_torch)
    for grads, what, passes in (((), "forward", 2), ((0, 1), "forward + backward", 5)):
        for shape in sizes:
            work = {"gb_s": 1e-9 * passes * shape[0] * shape[1] * dtype.itemsize}
            name = f"{'x'.join(map(str, shape))}, {what}"
            # the gradient of the weight is a sum over rows, rounded as often
            atol = near * max(1.0, shape[0] / 1000) ** 0.5
            yield Case(name, functions, partial(inputs, shape, dtype), by_torch, grads, atol=atol, work=work)
