"""silu_mul against torch in two steps and torch.compile."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case
from benchmarks.competitors import compiled
from fastrlhf import silu_mul

SIZES = {"cpu": [(16, 704), (686, 704), (2048, 5632)], "cuda": [(8192, 1536), (8192, 14336)], "tiny": [(3, 5)]}


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def by_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def cases(sizes: list[tuple[int, int]], device: str) -> Iterator[Case]:
    dtype, near = (torch.bfloat16, 0.1) if device == "cuda" else (torch.float32, 1e-5)
    functions = {"fastrlhf": silu_mul, "torch": by_torch, "torch.compile": compiled(by_torch)}
    for grads, what, passes in (((), "forward", 3), ((0, 1), "forward + backward", 8)):
        for shape in sizes:
            work = {"gb_s": 1e-9 * passes * shape[0] * shape[1] * dtype.itemsize}
            name = f"{'x'.join(map(str, shape))}, {what}"
            yield Case(name, functions, partial(inputs, shape, dtype), by_torch, grads, atol=near, work=work)
