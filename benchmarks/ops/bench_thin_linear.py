"""thin_linear against torch's product."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case
from fastrlhf import thin_linear

SHAPES = [(256, 704), (256, 8192), (576, 1536)]
SIZES = {
    "cpu": [(rows, *shape) for shape in SHAPES for rows in (4, 16, 64)],
    "cuda": [(64, 576, 1536)],
    "tiny": [(5, 3, 7)],
}


def inputs(num_rows: int, width: int, num_outputs: int) -> tuple[Tensor, ...]:
    return torch.randn(num_rows, width), torch.randn(num_outputs, width)


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    functions = {"fastrlhf": thin_linear, "torch": F.linear}
    for num_rows, width, num_outputs in sizes:
        work = {"gflop_s": 2e-9 * num_rows * width * num_outputs}
        name = f"{num_rows} rows, {width} to {num_outputs}"
        make = partial(inputs, num_rows, width, num_outputs)
        yield Case(name, functions, make, F.linear, atol=1e-3, work=work)
