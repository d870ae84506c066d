"""linear_kl_divergence against plain torch on whole logits, and Liger-Kernel."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case
from benchmarks.competitors import find
from fastrlhf import linear_kl_divergence

SIZES = {"cpu": [(512, 512, 32000)], "cuda": [(4096, 4096, 128256)], "tiny": [(5, 4, 50)]}


def inputs(rows: int, width: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden states and head of p, then of q."""
    return tuple((torch.randn(n, width) * s).to(dtype) for n, s in ((rows, 1.0), (size, 0.05)) * 2)


def few(hidden_p: Tensor, weight_p: Tensor, hidden_q: Tensor, weight_q: Tensor) -> tuple[Tensor, ...]:
    """A chunk and a half."""
    return hidden_p[:384], weight_p, hidden_q[:384], weight_q


def by_torch(hidden_p: Tensor, weight_p: Tensor, hidden_q: Tensor, weight_q: Tensor) -> Tensor:
    wide = torch.promote_types(hidden_p.dtype, torch.float32)
    log_p, log_q = (F.log_softmax(h @ w.t(), -1, dtype=wide) for h, w in ((hidden_p, weight_p), (hidden_q, weight_q)))
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()


def ours(*inputs: Tensor, **options: int) -> Tensor:
    return linear_kl_divergence(*inputs, **options).mean()


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    for rows, width, size in sizes:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        near = {"rtol": 0.1, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-7}
        functions = {"fastrlhf": ours, "fastrlhf, logits kept": partial(ours, memory_budget=2**40), "torch": by_torch}
        # Liger's student is our p; its beta of 1 is KL(student, teacher)
        if liger := find("liger_kernel.transformers.functional", device):
            functions["liger"] = partial(liger.liger_fused_linear_jsd, jsd_beta=1.0)
        made = partial(inputs, rows, width, size, dtype)
        for grads, what in (((), "forward"), ((0,), "forward and backward to hidden_p"), ((0, 1), "... to p")):
            given = {n: f for n, f in functions.items() if grads or n in ("fastrlhf", "torch")}
            name = f"{what}, {rows}x{width}x{size} {str(dtype).removeprefix('torch.')}"
            yield Case(name, given, made, by_torch, grads, few, memory=True, **near)
