"""Attention of one query a row over its slot of a cache: grouped queries, ragged lengths, a window, the keys split.

Every row's keys are cut at the same places whatever the batch, so a row's result depends on nothing but the row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
SPLIT = 256  # keys of one program; few rows with long caches still fill a GPU


@triton.jit
def attend(
    query, key_ptr, value_ptr, start, end, width, factor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr
):
    """The online softmax over keys start to end: maximum and sum of exponentials (ROWS,), values (ROWS, WIDTH)."""
    ROWS: tl.constexpr = query.shape[0]
    lanes = tl.arange(0, WIDTH)[None, :]
    highest = tl.full((ROWS,), float("-inf"), factor.dtype)
    total = tl.zeros((ROWS,), factor.dtype)
    sums = tl.zeros((ROWS, WIDTH), factor.dtype)
    for first in range(start, end, BLOCK):
        places = first + tl.arange(0, BLOCK)
        at = places[:, None] * width + lanes
        seen = (places < end)[:, None] & (lanes < width)
        keys = tl.load(key_ptr + at, mask=seen, other=0.0)
        scores = tl.dot(query, tl.trans(keys)) if DOT else tl.sum(keys * query, 1)[None, :]
        scores = tl.where((places < end)[None, :], scores * factor, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - raised)
        weights = tl.exp2(scores - raised[:, None])
        highest = raised
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(value_ptr + at, mask=seen, other=0.0)
        if DOT:
            sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None])
        else:
            sums = sums * shrink[:, None] + tl.sum(tl.trans(weights) * values, 0)[None, :]
    return highest, total, sums


@triton.jit(do_not_specialize=["max_length", "num_splits"])
def decode_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    lengths_ptr,
    out_ptr,
    partial_ptr,
    statistics_ptr,
    num_heads,
    num_kv_heads,
    width,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    max_length,
    window,
    num_splits,
    scale: tl.float64,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program HEADS query heads of a row that share a key head, and SPLIT of its keys.

    ROWS and WIDTH are HEADS and the width of a head, padded. DOT: tensor cores multiply, so ROWS is at least 16. Where
    there are several splits each leaves its sum of values in partial (N, H, splits, K), and its maximum and sum of
    exponentials in statistics (N, H, splits, 2)."""
    split = tl.program_id(0) % num_splits
    tile = tl.program_id(0) // num_splits % (num_heads // HEADS)
    n = (tl.program_id(0) // num_splits // (num_heads // HEADS)).to(tl.int64)
    kv_head = tile * HEADS // (num_heads // num_kv_heads)
    key_ptr += n * key_row_stride + kv_head * key_head_stride
    value_ptr += n * value_row_stride + kv_head * value_head_stride
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + n), 0), max_length)
    start = split * SPLIT
    end = tl.minimum(start + SPLIT, length)
    if window > 0:
        start = tl.maximum(start, length - window)
    rows = tl.arange(0, ROWS)
    lanes = tl.arange(0, WIDTH)[None, :]
    heads = n * num_heads + tile * HEADS + rows
    inside = (rows < HEADS)[:, None] & (lanes < width)
    query = tl.load(query_ptr + heads[:, None] * width + lanes, mask=inside, other=0.0)
    factor = tl.full((), scale, partial_ptr.dtype.element_ty) * LOG2E
    highest, total, sums = attend(query, key_ptr, value_ptr, start, end, width, factor, WIDTH, BLOCK, DOT)
    if num_splits == 1:
        sums = tl.where(total[:, None] == 0, 0.0, sums / total[:, None])
        tl.store(out_ptr + heads[:, None] * width + lanes, sums, mask=inside)
    else:
        slots = heads * num_splits + split
        tl.store(partial_ptr + slots[:, None] * width + lanes, sums, mask=inside)
        tl.store(statistics_ptr + 2 * slots, highest, mask=rows < HEADS)
        tl.store(statistics_ptr + 2 * slots + 1, total, mask=rows < HEADS)


@triton.jit(do_not_specialize=["num_splits"])
def decode_attention_join_kernel(
    partial_ptr, statistics_ptr, out_ptr, width, num_splits, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a query head of a row: joins what its splits left."""
    head = tl.program_id(0).to(tl.int64)
    partial_ptr += head * num_splits * width
    statistics_ptr += head * num_splits * 2
    wide = partial_ptr.dtype.element_ty
    lanes = tl.arange(0, WIDTH)[None, :]
    highest = tl.full((), float("-inf"), wide)
    for first in range(0, num_splits, BLOCK):
        splits = first + tl.arange(0, BLOCK)
        maxima = tl.load(statistics_ptr + 2 * splits, mask=splits < num_splits, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(maxima, 0))
    highest = tl.where(highest == float("-inf"), 0.0, highest)  # no split had a key
    total = tl.zeros((), wide)
    sums = tl.zeros((WIDTH,), wide)
    for first in range(0, num_splits, BLOCK):
        splits = first + tl.arange(0, BLOCK)
        maxima = tl.load(statistics_ptr + 2 * splits, mask=splits < num_splits, other=float("-inf"))
        totals = tl.load(statistics_ptr + 2 * splits + 1, mask=splits < num_splits, other=0.0)
        shares = tl.where(maxima == float("-inf"), 0.0, tl.exp2(maxima - highest))
        at = splits[:, None] * width + lanes
        part = tl.load(partial_ptr + at, mask=(splits < num_splits)[:, None] & (lanes < width), other=0.0)
        total += tl.sum(shares * totals, 0)
        sums += tl.sum(shares[:, None] * part, 0)
    sums = tl.where(total == 0, 0.0, sums / total)
    lane = tl.arange(0, WIDTH)
    tl.store(out_ptr + head * width + lane, sums, mask=lane < width)


def decode_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, scale: float, window: int
) -> Tensor:
    """Returns the output, like query.

    query: (N, H, K) and lengths: (N,) int32, contiguous; caches: (slots, kv heads, Tmax, K), the last two dimensions
    dense; window: 0 for none"""
    num_rows, num_heads, width = query.shape
    num_kv_heads, max_length = key_cache.shape[1:3]
    half = query.element_size() == 2
    heads = num_heads // num_kv_heads if half else 1
    padded = max(16, triton.next_power_of_2(width))
    num_splits = max(1, triton.cdiv(max_length, SPLIT))
    out = torch.empty_like(query)
    wide = torch.promote_types(query.dtype, torch.float32)
    shape = (num_rows, num_heads, num_splits) if num_splits > 1 else (0,)
    partial, statistics = (query.new_empty(*shape, k, dtype=wide) for k in (width, 2))
    if not out.numel():
        return out
    with torch.cuda.device_of(query):
        decode_attention_kernel[(num_rows * num_heads // heads * num_splits,)](
            query,
            key_cache,
            value_cache,
            lengths,
            out,
            partial,
            statistics,
            num_heads,
            num_kv_heads,
            width,
            *key_cache.stride()[:2],
            *value_cache.stride()[:2],
            max_length,
            window,
            num_splits,
            scale,
            HEADS=heads,
            ROWS=max(16, triton.next_power_of_2(heads)) if half else 1,
            WIDTH=padded,
            BLOCK=max(16, min(64, 128 * 128 // (padded * query.element_size()))),
            SPLIT=SPLIT,
            DOT=half,
            num_stages=2,
        )
        if num_splits > 1:
            decode_attention_join_kernel[(num_rows * num_heads,)](
                partial, statistics, out, width, num_splits, WIDTH=padded, BLOCK=16
            )
    return out
