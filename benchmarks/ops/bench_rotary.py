"""rotary against the steps of transformers and torch.compile."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.competitors import compiled
from fastrlhf import rotary

# tokens, heads, width of a head
SIZES = {"cpu": [(16, 4, 64), (686, 4, 64), (2048, 16, 128)], "cuda": [(8192, 32, 128)], "tiny": [(3, 2, 8)]}


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    angle = torch.arange(shape[0])[:, None] * 0.9 ** torch.arange(shape[2] // 2)
    return torch.randn(shape).to(dtype), *(f(angle.repeat(1, 2)).to(dtype) for f in (torch.cos, torch.sin))


def by_transformers(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states[..., : states.shape[-1] // 2], states[..., states.shape[-1] // 2 :]
    return states * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def cases(sizes: list[tuple[int, int, int]], device: str) -> Iterator[Case]:
    dtype, near = (torch.bfloat16, 0.1) if device == "cuda" else (torch.float32, 1e-5)
    functions = {"fastrlhf": rotary, "transformers": by_transformers, "torch.compile": compiled(by_transformers)}
    for grads, what, passes in (((), "forward", 2), ((0,), "forward + backward", 4)):
        for shape in sizes:
            work = {"gb_s": 1e-9 * passes * shape[0] * shape[1] * shape[2] * dtype.itemsize}
            name = f"{'x'.join(map(str, shape))}, {what}"
            yield Case(name, functions, partial(inputs, shape, dtype), by_transformers, grads, atol=near, work=work)
