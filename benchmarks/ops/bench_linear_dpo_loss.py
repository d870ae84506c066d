"""linear_dpo_loss against DPO on full logits: forward and backward to hidden states and head.

Pairs of 256 rows fit in a chunk, which takes three matrix products; pairs of 1024 rows take four. Extra memory is the
peak beyond inputs, outputs and gradients."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case
from fastrlhf import linear_dpo_loss, linear_token_logprobs

SIZES = {"cpu": [(1024, 512, 32000)], "cuda": [(8192, 4096, 128256)], "tiny": [(1024, 4, 50)]}
BETA = 0.1


def inputs(rows: int, width: int, size: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(size, width) * 0.05).to(dtype)
    targets, cu_seqlens = torch.randint(size, (rows,)), torch.arange(0, rows + 1, length, dtype=torch.int32)
    ref = linear_token_logprobs(hidden, weight, targets)
    return hidden, weight, targets, cu_seqlens, ref + 0.1 * torch.randn_like(ref)


def few(hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor, ref: Tensor) -> tuple[Tensor, ...]:
    """1024 rows: a pair, or more."""
    return hidden[:1024], weight, targets[:1024], cu_seqlens[cu_seqlens <= 1024], ref[:1024]


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor, ref: Tensor) -> Tensor:
    table = F.log_softmax(hidden @ weight.t(), -1, dtype=torch.promote_types(hidden.dtype, torch.float32))
    logprobs = table.gather(1, targets[:, None])[:, 0]
    rewards = BETA * (logprobs - ref).view(cu_seqlens.shape[0] - 1, -1).sum(1)  # sequences are of one length here
    return -F.logsigmoid(rewards[::2] - rewards[1::2]).mean()


def ours(*inputs: Tensor) -> Tensor:
    return linear_dpo_loss(*inputs, beta=BETA)[0]


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    for rows, width, size in sizes:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        near = {"rtol": 0.1, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-6}
        functions = {"fastrlhf": ours, "torch full logits": full_logits}
        for length in (128, 512):
            pairs = f"{rows // length // 2} pairs of {2 * length} rows"
            name = f"fwd+bwd, {pairs}, {width}x{size} {str(dtype).removeprefix('torch.')}"
            made = partial(inputs, rows, width, size, length, dtype)
            yield Case(name, functions, made, full_logits, (0, 1), few, memory=True, **near)
