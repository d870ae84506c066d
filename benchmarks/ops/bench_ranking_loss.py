"""ranking_loss, its statistics included, against plain torch and torch.compile.

Groups are of one size and without ties: theirs may be (G, K) operations, ours does not know that it could be.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case
from benchmarks.competitors import compiled
from fastrlhf import ranking_loss

SIZES = {"cpu": [(64, 8)], "cuda": [(64, 8)], "tiny": [(2, 3)]}
Outputs = tuple[Tensor, ...]


def inputs(num: int, size: int) -> Outputs:
    return torch.randn(num, size), torch.arange(0, num * size + 1, size, dtype=torch.int32)


def ours(scores: Tensor, cu_groups: Tensor, kind: str) -> Outputs:
    loss, stats = ranking_loss(scores.flatten(), cu_groups, kind=kind)
    return loss, *stats.values()


def by_torch(scores: Tensor, cu_groups: Tensor, kind: str) -> Outputs:
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], 1, device=scores.device)
    margins = scores[:, first] - scores[:, second]
    if kind == "pairwise":
        loss = -F.logsigmoid(margins).mean()
    else:
        loss = (scores.flip(1).logcumsumexp(1).flip(1) - scores).sum(1).mean()
    with torch.no_grad():
        return loss, (0.5 * margins.sign() + 0.5).mean(), margins.mean()


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    for kind in ("plackett_luce", "pairwise"):
        torch_side = partial(by_torch, kind=kind)
        functions = {"fastrlhf": partial(ours, kind=kind), "torch": torch_side}
        functions["torch.compile"] = compiled(torch_side)
        for grads, what in (((), "forward"), ((0,), "forward + backward")):
            for num, size in sizes:
                name = f"{kind}, {num} groups of {size}, {what}"
                yield Case(name, functions, partial(inputs, num, size), torch_side, grads, atol=1e-4)
