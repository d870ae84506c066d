"""decode_attention against torch's scaled_dot_product_attention with a mask over padded slots."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case
from fastrlhf import decode_attention

# rows, heads, heads of keys, places of a slot, width of a head
SIZES = {"cpu": [(64, 9, 3, 1024, 64)], "cuda": [(64, 32, 8, 4096, 128)], "tiny": [(3, 4, 2, 8, 16)]}


def inputs(
    lengths: Tensor, heads: int, kv_heads: int, places: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    caches = torch.randn(2, len(lengths), kv_heads, places, width).to(dtype)
    return torch.randn(len(lengths), heads, width).to(dtype), *caches, lengths.to(caches.device)


def by_torch(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    seen = torch.arange(keys.shape[2], device=keys.device) < lengths[:, None]
    attention = F.scaled_dot_product_attention
    return attention(query[:, :, None], keys, values, attn_mask=seen[:, None, None], enable_gqa=True)[:, :, 0]


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    for rows, heads, kv_heads, places, width in sizes:
        dtype, near = (torch.bfloat16, 0.05) if device == "cuda" else (torch.float32, 1e-5)
        for what, least in (("ragged", 1), ("full", places)):
            lengths = torch.linspace(least, places, rows).int()
            name = f"{what} slots, {rows} x {places}, {heads} heads, {kv_heads} of keys, {width} wide"
            made = partial(inputs, lengths, heads, kv_heads, places, width, dtype)
            work = {"gb_s": 2e-9 * int(lengths.sum()) * kv_heads * width * dtype.itemsize}
            functions = {"fastrlhf": decode_attention, "SDPA": by_torch}
            yield Case(name, functions, made, by_torch, atol=near, work=work)
