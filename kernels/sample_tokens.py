"""One draw a row by inverse CDF, with the log-probability of what was drawn."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
FIXED_POINT = tl.constexpr(2.0**40)
# how many of the upper bits of a float32 (float64) a logit can differ in
NUM_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32, torch.float64: 64}


@triton.jit
def mix(z):
    """The output function of splitmix64, of a uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def uniform(seed, position):
    """In [0, 1), number `position` of the splitmix64 stream that starts at the hash of `seed`: 53 bits of it."""
    start = mix(seed.to(tl.uint64, bitcast=True) + GOLDEN)
    bits = mix(start + (position.to(tl.uint64, bitcast=True) + 1) * GOLDEN)
    return (bits >> 11).to(tl.float64) * (2.0**-53)


@triton.jit
def order_of(x):
    """Unsigned integers in the order of the floating-point numbers."""
    x += 0.0  # -0 and 0 are one number
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        order = bits.to(tl.uint64, bitcast=True) ^ ((bits >> 63).to(tl.uint64, bitcast=True) | 0x8000000000000000)
    else:
        bits = x.to(tl.int32, bitcast=True)
        order = bits.to(tl.uint32, bitcast=True) ^ ((bits >> 31).to(tl.uint32, bitcast=True) | 0x80000000)
    return order


@triton.jit
def threshold(logits_ptr, size, highest, factor, lowest, wanted, COUNT: tl.constexpr, BITS: tl.constexpr, BLOCK):
    """The largest c such that the tokens with order >= c weigh `wanted` in all, among those with order >= lowest.

    COUNT: each weighs 1. Each pass over the row, which is in the cache by then, fixes the next bit of c."""
    found = tl.zeros_like(lowest)
    step = (tl.zeros_like(lowest) + 1) << (lowest.dtype.primitive_bitwidth - 1)
    for _ in range(BITS):
        candidate = tl.maximum(found + step, lowest)
        weights = tl.zeros((BLOCK,), factor.dtype)
        for start in range(0, size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + columns, mask=columns < size, other=float("-inf")).to(factor.dtype)
            weight = (columns < size).to(factor.dtype) if COUNT else tl.exp2((x - highest) * factor)
            weights += tl.where(order_of(x) >= candidate, weight, 0.0)
        found = tl.where(tl.sum(weights, 0) >= wanted, found + step, found)
        step = step >> 1
    return tl.maximum(found, lowest)


@triton.jit
def weights_of(logits_ptr, columns, size, highest, factor, lowest, min_p):
    """The probabilities of a block of tokens relative to the likeliest, 0 for those that were dropped."""
    x = tl.load(logits_ptr + columns, mask=columns < size, other=float("-inf")).to(factor.dtype)
    weights = tl.exp2((x - highest) * factor)
    # a NaN stays: it is not below min_p
    return tl.where((order_of(x) < lowest) | (weights < min_p), 0.0, weights)


@triton.jit
def sum_weights(logits_ptr, size, highest, factor, lowest, BLOCK: tl.constexpr):
    """The sum of the weights of the tokens with order >= lowest."""
    lanes = tl.zeros((BLOCK,), factor.dtype)
    for start in range(0, size, BLOCK):
        lanes += weights_of(logits_ptr, start + tl.arange(0, BLOCK), size, highest, factor, lowest, 0.0)
    return tl.sum(lanes, 0)


@triton.jit
def draw(logits_ptr, size, highest, factor, lowest, min_p, number, BLOCK: tl.constexpr):
    """The first token whose CDF exceeds `number` of the whole, and the sum of the weights of the tokens that are kept.

    The CDF is of integers, so that its blocks add up to it whatever the order of additions."""
    lanes = tl.zeros((BLOCK,), factor.dtype)
    shares = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, size, BLOCK):
        weights = weights_of(logits_ptr, start + tl.arange(0, BLOCK), size, highest, factor, lowest, min_p)
        lanes += weights
        shares += (weights * FIXED_POINT).to(tl.int64)
    whole = tl.sum(shares, 0)
    target = tl.minimum((number * whole.to(tl.float64)).to(tl.int64), whole - 1)  # the product may round up to the end
    before = tl.zeros((), tl.int64)
    token = tl.zeros((), tl.int64)
    for start in range(0, size, BLOCK):
        weights = weights_of(logits_ptr, start + tl.arange(0, BLOCK), size, highest, factor, lowest, min_p)
        shares = (weights * FIXED_POINT).to(tl.int64)
        after = before + tl.sum(shares, 0)
        if (before <= target) & (target < after):
            token = start + tl.sum((before + tl.cumsum(shares, 0) <= target).to(tl.int64), 0)
        before = after
    return token, tl.sum(lanes, 0)


@triton.jit
def sample_tokens_kernel(
    logits_ptr,
    seeds_ptr,
    positions_ptr,
    tokens_ptr,
    logprobs_ptr,
    sampler_logprobs_ptr,
    size,
    stride,
    top_k,
    scale: tl.float64,
    top_p: tl.float64,
    min_p: tl.float64,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row, which passes over it again and again: after the first time it is in the cache."""
    row = tl.program_id(0).to(tl.int64)
    wide = logprobs_ptr.dtype.element_ty
    logits_ptr += row * stride
    factor = tl.full((), scale, wide) * LOG2E
    highest = tl.full((), float("-inf"), wide)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + columns, mask=columns < size, other=float("-inf")).to(wide)
        highest = tl.maximum(highest, tl.max(x, 0))
    lowest = tl.zeros_like(order_of(highest))
    total = sum_weights(logits_ptr, size, highest, factor, lowest, BLOCK)
    if TOP_K:
        lowest = threshold(logits_ptr, size, highest, factor, lowest, top_k, True, BITS, BLOCK)
    if TOP_P:
        wanted = sum_weights(logits_ptr, size, highest, factor, lowest, BLOCK) * tl.full((), top_p, wide)
        lowest = threshold(logits_ptr, size, highest, factor, lowest, wanted, False, BITS, BLOCK)
    number = uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    least = tl.full((), min_p, wide)
    token, kept = draw(logits_ptr, size, highest, factor, lowest, least, number, BLOCK)
    token = tl.where(total == total, token, 0)
    z = (tl.load(logits_ptr + token).to(wide) - highest) * tl.full((), scale, wide)
    tl.store(tokens_ptr + row, token)
    tl.store(logprobs_ptr + row, z - tl.log(total))
    tl.store(sampler_logprobs_ptr + row, z - tl.log(kept))


def sample_tokens(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens, logprobs and sampler_logprobs, each (N,).

    logits: (N, V), rows of consecutive elements; seeds, positions: (N,) int64, contiguous"""
    num_rows, size = logits.shape
    tokens = torch.empty_like(seeds)
    wide = torch.promote_types(logits.dtype, torch.float32)
    logprobs, sampler_logprobs = (logits.new_empty(num_rows, dtype=wide) for _ in range(2))
    if num_rows:
        with torch.cuda.device_of(logits):
            sample_tokens_kernel[(num_rows,)](
                logits,
                seeds,
                positions,
                tokens,
                logprobs,
                sampler_logprobs,
                size,
                logits.stride(0),
                top_k,
                1.0 / temperature,
                top_p,
                min_p,
                TOP_K=0 < top_k < size,
                TOP_P=top_p < 1,
                BITS=NUM_BITS[logits.dtype],
                BLOCK=min(16384 // wide.itemsize, max(256, triton.next_power_of_2(size))),
                num_warps=16,
            )
    return tokens, logprobs, sampler_logprobs
