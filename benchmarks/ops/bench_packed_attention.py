"""packed_attention against torch's attention, a call a sequence."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case
from fastrlhf import packed_attention

# lengths from and to, sequences, heads, heads of keys, width of a head
SIZES = {
    "cpu": [(124, 214, 4, 4, 4, 64), (64, 64, 16, 4, 4, 64), (1024, 1024, 2, 8, 2, 64)],
    "cuda": [(200, 1000, 8, 32, 8, 128)],
    "tiny": [(3, 7, 3, 4, 2, 8)],
}


def inputs(lengths: list[int], heads: int, kv_heads: int, width: int) -> tuple[Tensor, ...]:
    tensors = [torch.randn(sum(lengths), h, width) for h in (heads, kv_heads, kv_heads)]
    return *tensors, torch.tensor([0, *lengths]).cumsum(0).int()


def by_torch(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    lengths, outputs = cu_seqlens.diff().tolist(), []
    for q, k, v in zip(*(t.transpose(0, 1)[None].split(lengths, 2) for t in (query, key, value)), strict=True):
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]))
    return torch.cat(outputs, 2)[0].transpose(0, 1)


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    functions = {"fastrlhf": packed_attention, "SDPA": by_torch}
    for grads, what, products in (((), "forward", 2), ((0, 1, 2), "forward + backward", 7)):
        for first, last, num, heads, kv_heads, width in sizes:
            lengths = torch.linspace(first, last, num).long().tolist()
            name = f"{num} sequences of {first} to {last}, {heads} heads, {kv_heads} of keys, {width} wide, {what}"
            work = {"gflop_s": 1e-9 * products * heads * width * sum(n * n for n in lengths)}
            made = partial(inputs, lengths, heads, kv_heads, width)
            yield Case(name, functions, made, by_torch, grads, atol=1e-4, work=work)
