"""Divergence of two rows of logits, and its gradient in both.

Kullback and Leibler's takes one read of each row; that of Jensen and Shannon two, the second from the L2 cache where it
holds the rows of all resident programs, and else from memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log2_of_ratios(log_p, log_q):
    """log2(p / m) and log2(q / m), m = (p + q) / 2, from log2 of p and q; exactly 0 where they are equal."""
    gap = tl.abs(log_p - log_q)
    e = tl.exp2(-gap)
    of_larger = 1.0 - tl.log2(1.0 + e)
    of_larger = tl.where(gap == 0, 0.0, of_larger)
    of_smaller = of_larger - gap
    below = log_p < log_q
    return tl.where(below, of_smaller, of_larger), tl.where(below, of_larger, of_smaller)


@triton.jit
def log2_of(logits_ptr, columns, size, highest, log_sum, scale_2):
    """log2 of the probabilities of a block of tokens; -inf beyond the row."""
    x = tl.load(logits_ptr + columns, mask=columns < size, other=float("-inf")).to(highest.dtype)
    return (x - highest) * scale_2 - log_sum * LOG2E


@triton.jit
def sums_of(p_ptr, q_ptr, size, scale_2, BLOCK: tl.constexpr):
    """With z = (x - highest) scale: the maxima, sum e^zp, sum e^zq, and log2(e) E_p[zp - zq]."""
    wide = scale_2.dtype
    highest_p = tl.full((), float("-inf"), wide)
    highest_q = tl.full((), float("-inf"), wide)
    exps_p = tl.zeros((BLOCK,), wide)
    exps_q = tl.zeros((BLOCK,), wide)
    crossed = tl.zeros((BLOCK,), wide)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        p = tl.load(p_ptr + columns, mask=columns < size, other=float("-inf")).to(wide)
        q = tl.load(q_ptr + columns, mask=columns < size, other=float("-inf")).to(wide)
        block_p = tl.max(p, 0)  # both pass over NaN, which comes back in the sums of exponentials
        block_q = tl.max(q, 0)
        if block_p > highest_p:
            shift = (highest_p - block_p) * scale_2
            factor = tl.exp2(shift)
            crossed = tl.where(exps_p * factor > 0, factor * (crossed + exps_p * shift), 0.0)
            exps_p *= factor
            highest_p = block_p
        if block_q > highest_q:
            shift = (highest_q - block_q) * scale_2
            crossed = tl.where(exps_p > 0, crossed - exps_p * shift, crossed)  # infinite if so far q was 0
            exps_q *= tl.exp2(shift)
            highest_q = block_q
        zp = (p - tl.where(highest_p == float("-inf"), 0.0, highest_p)) * scale_2
        zq = (q - tl.where(highest_q == float("-inf"), 0.0, highest_q)) * scale_2
        e = tl.exp2(zp)
        exps_p += e
        exps_q += tl.exp2(zq)
        crossed += tl.where(e > 0, e * (zp - zq), 0.0)
    total = tl.sum(exps_p, 0)
    return highest_p, highest_q, total, tl.sum(exps_q, 0), tl.sum(crossed, 0) / total


@triton.jit
def kl_divergence_kernel(
    p_ptr,
    q_ptr,
    divergence_ptr,
    statistics_ptr,
    size,
    stride_p,
    stride_q,
    scale: tl.float64,
    JENSEN_SHANNON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    p_ptr += row * stride_p
    q_ptr += row * stride_q
    statistics_ptr += row * 6
    wide = divergence_ptr.dtype.element_ty
    scale_2 = (tl.full((), scale, tl.float64) * LOG2E).to(wide)
    highest_p, highest_q, sum_p, sum_q, crossed = sums_of(p_ptr, q_ptr, size, scale_2, BLOCK)
    log_sum_p = tl.log(sum_p)
    log_sum_q = tl.log(sum_q)
    tl.store(statistics_ptr, highest_p)
    tl.store(statistics_ptr + 1, log_sum_p)
    tl.store(statistics_ptr + 2, highest_q)
    tl.store(statistics_ptr + 3, log_sum_q)
    if JENSEN_SHANNON:
        lanes_p = tl.zeros((BLOCK,), wide)
        lanes_q = tl.zeros((BLOCK,), wide)
        for start in range(0, size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            log_p = log2_of(p_ptr, columns, size, highest_p, log_sum_p, scale_2)
            log_q = log2_of(q_ptr, columns, size, highest_q, log_sum_q, scale_2)
            of_p, of_q = log2_of_ratios(log_p, log_q)
            p = tl.exp2(log_p)
            q = tl.exp2(log_q)
            lanes_p += tl.where(p == 0, 0.0, p * of_p)
            lanes_q += tl.where(q == 0, 0.0, q * of_q)
        of_p = tl.sum(lanes_p, 0) * LN2
        of_q = tl.sum(lanes_q, 0) * LN2
        result = (of_p + of_q) / 2
    else:
        result = crossed * LN2 + tl.log(sum_q / sum_p)  # a difference of the logarithms would lose digits
        of_p = result
        of_q = tl.zeros((), wide)
    tl.store(statistics_ptr + 4, of_p)
    tl.store(statistics_ptr + 5, of_q)
    tl.store(divergence_ptr + row, tl.where(result < 0, 0.0, result))


@triton.jit
def kl_divergence_backward_kernel(
    grad_ptr,
    p_ptr,
    q_ptr,
    statistics_ptr,
    grad_p_ptr,
    grad_q_ptr,
    size,
    stride_p,
    stride_q,
    grad_stride_p,
    grad_stride_q,
    num_blocks,
    scale: tl.float64,
    JENSEN_SHANNON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of columns of a row. Gradients may lie where the logits are."""
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    columns = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    statistics_ptr += row * 6
    wide = statistics_ptr.dtype.element_ty
    grad = tl.load(grad_ptr + row)
    of_p_grads = tl.zeros((BLOCK,), wide)
    of_q_grads = tl.zeros((BLOCK,), wide)
    if grad != 0:
        exact = tl.full((), scale, tl.float64)
        scale_2 = (exact * LOG2E).to(wide)
        upstream = grad * exact.to(wide)
        highest_p, log_sum_p = tl.load(statistics_ptr), tl.load(statistics_ptr + 1)
        highest_q, log_sum_q = tl.load(statistics_ptr + 2), tl.load(statistics_ptr + 3)
        log_p = log2_of(p_ptr + row * stride_p, columns, size, highest_p, log_sum_p, scale_2)
        log_q = log2_of(q_ptr + row * stride_q, columns, size, highest_q, log_sum_q, scale_2)
        p = tl.exp2(log_p)
        q = tl.exp2(log_q)
        if JENSEN_SHANNON:
            ratio_p, ratio_q = log2_of_ratios(log_p, log_q)
            of_q = LN2 * ratio_q - tl.load(statistics_ptr + 5)
            of_q_grads = tl.where(q == 0, 0.0, 0.5 * upstream * q * of_q)
            upstream *= 0.5
        else:
            ratio_p = log_p - log_q
            of_q_grads = upstream * (q - p)
        of_p_grads = tl.where(p == 0, 0.0, upstream * p * (LN2 * ratio_p - tl.load(statistics_ptr + 4)))
    if grad_p_ptr is not None:
        tl.store(grad_p_ptr + row * grad_stride_p + columns, of_p_grads, mask=inside)
    if grad_q_ptr is not None:
        tl.store(grad_q_ptr + row * grad_stride_q + columns, of_q_grads, mask=inside)


def block_of(size: int) -> int:
    """Columns that one program reads at once, of each side."""
    return min(2048, max(256, triton.next_power_of_2(size)))


def kl_divergence(
    logits_p: Tensor, logits_q: Tensor, outputs: tuple[Tensor, Tensor], temperature: float, jensen_shannon: bool
) -> None:
    """Writes outputs: divergence (T,) and statistics (T, 6). logits: (T, V), rows of consecutive elements."""
    num_rows, size = logits_p.shape
    if num_rows:
        with torch.cuda.device_of(logits_p):
            kl_divergence_kernel[(num_rows,)](
                logits_p,
                logits_q,
                *outputs,
                size,
                logits_p.stride(0),
                logits_q.stride(0),
                1.0 / temperature,
                JENSEN_SHANNON=jensen_shannon,
                BLOCK=block_of(size),
                num_warps=8,
            )


def kl_divergence_backward(
    grad: Tensor,
    logits_p: Tensor,
    logits_q: Tensor,
    statistics: Tensor,
    grads: list[Tensor | None],
    temperature: float,
    jensen_shannon: bool,
) -> None:
    """Writes the gradients that are not None, each of the shape and dtype of the logits, which it may be.

    grad: (T,) and statistics: (T, 6), contiguous"""
    num_rows, size = logits_p.shape
    num_blocks = triton.cdiv(size, block_of(size))
    if num_rows:
        with torch.cuda.device_of(logits_p):
            kl_divergence_backward_kernel[(num_rows * num_blocks,)](
                grad,
                logits_p,
                logits_q,
                statistics,
                *grads,
                size,
                logits_p.stride(0),
                logits_q.stride(0),
                *(0 if g is None else g.stride(0) for g in grads),
                num_blocks,
                1.0 / temperature,
                JENSEN_SHANNON=jensen_shannon,
                BLOCK=block_of(size),
                num_warps=8,
            )
