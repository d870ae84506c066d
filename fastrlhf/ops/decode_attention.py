"""Attention of one new token a row over its cached keys and values."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import FLOATS, dtype_in, dtype_name, has_shape, indices_below, same_device, same_shape
from fastrlhf.ops._launch import triton
from fastrlhf.ops._registry import op

triton_kernel = triton("decode_attention")


def decode_attention_ref(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, scale: float, window: int
) -> Tensor:
    num_rows, num_heads, width = query.shape
    num_kv_heads, max_length = key_cache.shape[1:3]
    keys, values = key_cache[:num_rows].to(query.dtype), value_cache[:num_rows].to(query.dtype)
    places, ends = torch.arange(max_length, device=query.device), lengths[:, None]
    seen = places < ends
    if window > 0:
        seen &= places >= ends - window
    grouped = query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, width)
    scores = (grouped @ keys.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scale
    probs = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).to(query.dtype)
    seen = seen[:, None, :, None]
    probs = probs.masked_fill(~seen.transpose(-1, -2), 0.0)  # a row of length 0 has no softmax
    return (probs @ values.masked_fill(~seen, 0.0)).reshape(num_rows, num_heads, width)


def _check(query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, *rest: Any) -> None:
    name = "decode_attention"
    same_device(name, query=query, key_cache=key_cache, value_cache=value_cache, lengths=lengths)
    dtype_in(name, "query", query, FLOATS)
    has_shape(name, "query", query, (None, None, None), "(N, H, K)")
    num_rows, num_heads, width = query.shape
    has_shape(name, "key_cache", key_cache, (None, None, None, width), "(slots, kv heads, Tmax, K)")
    same_shape(name, key_cache=key_cache, value_cache=value_cache)
    for cache_name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        dtype_in(name, cache_name, cache, (query.dtype,))
    num_slots, num_kv_heads, max_length, _ = key_cache.shape
    if num_slots < num_rows:
        raise ValueError(f"{name}: the caches must have a slot for each of the {num_rows} rows, got {num_slots}")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"{name}: the {num_heads} query heads must be a multiple of the {num_kv_heads} kv heads")
    dtype_in(name, "lengths", lengths, (torch.int32,))
    has_shape(name, "lengths", lengths, (num_rows,), "(N,)")
    indices_below(name, "lengths", lengths, max_length + 1)


def _fake(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _cpu_forward(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, scale: float, window: int
) -> Tensor:
    key_cache, value_cache = _rows_contiguous(key_cache), _rows_contiguous(value_cache)
    # only the caches are read in half precision: query and output are small
    wide = query.to(torch.promote_types(query.dtype, torch.float32)).contiguous()
    lengths, out = lengths.contiguous(), torch.empty_like(wide)
    getattr(_cpu, f"decode_attention_{dtype_name(key_cache)}")(
        wide.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        lengths.data_ptr(),
        out.data_ptr(),
        query.shape[0],
        query.shape[1],
        key_cache.shape[1],
        query.shape[2],
        *key_cache.stride()[:2],
        *value_cache.stride()[:2],
        scale,
        window,
        torch.get_num_threads(),
    )
    return out.to(query.dtype)


def _cuda_forward(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, scale: float, window: int
) -> Tensor:
    caches = _rows_contiguous(key_cache), _rows_contiguous(value_cache)
    return triton_kernel.decode_attention(query.contiguous(), *caches, lengths.contiguous(), scale, window)


def _rows_contiguous(cache: Tensor) -> Tensor:
    """The cache itself if its last two dimensions are laid out densely: views of a larger cache are not copied."""
    dense = cache.stride(3) == 1 and cache.stride(2) == cache.shape[3]
    return cache if dense else cache.contiguous()


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (0, 1, 1, 4, 8, 0),
        (1, 2, 2, 1, 1, 0),
        (3, 4, 2, 9, 16, 4),
        (2, 6, 1, 300, 40, 0),
        (3, 2, 2, 200, 64, 70),
    ]
    for num_rows, num_heads, num_kv_heads, max_length, width, window in shapes:
        query = torch.randn(num_rows, num_heads, width, generator=generator)
        caches = torch.randn(2, num_rows + 1, num_kv_heads, max_length, width, generator=generator)
        lengths = torch.linspace(max_length, 0, num_rows).to(torch.int32)
        for n, length in enumerate(lengths.tolist()):
            caches[:, n, :, length:] = torch.nan  # nothing may read past a row's length
        key_cache, value_cache = caches.to(device, dtype)
        yield query.to(device, dtype), key_cache, value_cache, lengths.to(device), width**-0.5, window


_op = op(
    "decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths, float scale, int window)"
    " -> Tensor",
    ref=decode_attention_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=_cuda_forward if triton_kernel else None,
    check=_check,
    samples=samples,
)


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Returns the attention output of one token a row, over the cached tokens of that row.

    out[n, h] = softmax_t(scale query[n, h] . key_cache[n, h // G, t]) value_cache[n, h // G, t], G = H / kv heads, over
    t < lengths[n] and, with a window, t >= lengths[n] - window: the new token, already cached, counts.

    query: (N, H, K) float32|float64|bfloat16|float16
    key_cache, value_cache: (slots >= N, kv heads, Tmax, K) like query; row n reads slot n, never past its length
    lengths: (N,) int32, cached tokens of each row, at most Tmax; a row of length 0 gives 0
    scale: K^-1/2 if not given
    window: number of last tokens seen; all if not given

    No gradient. Softmax in float32 (float64 in float64), keys in order.
    Raises: ValueError for shapes, devices, lengths, a scale or a window that do not fit, TypeError for dtypes.
    Source: Vaswani et al., arXiv 1706.03762, equation 1; Ainslie et al., arXiv 2305.13245 (grouped queries).
    """
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: window must be at least 1 or None, got {window}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"decode_attention: scale must be finite or None, got {scale}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _op(query, key_cache, value_cache, lengths, scale, window or 0)
