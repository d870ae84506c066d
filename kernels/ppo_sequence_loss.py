"""The clipped surrogate of PPO with one ratio a sequence: a read of the tokens, then a write of their gradient.

All tokens of a sequence have one ratio, so its bounds hold either all of those with a positive advantage or none, and
likewise those with a negative one. Sums over the two kinds are all that loss, statistics and gradient need.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrlhf.kernels.approx_kl import exp_minus_linear
from fastrlhf.kernels.ppo_policy_loss import write_totals

BLOCK = 1024
MOST_PROGRAMS = 1024  # of those that write the gradient, as each counts all sequences


@triton.jit
def ppo_sequence_sums_kernel(
    logprobs_ptr,
    old_logprobs_ptr,
    advantages_ptr,
    cu_seqlens_ptr,
    mask_ptr,
    rows_ptr,
    num_sequences,
    lowest: tl.float64,
    highest: tl.float64,
    dual_clip: tl.float64,
    BLOCK: tl.constexpr,
):
    """One program a sequence: its column of rows (8, N).

    Those are its means of loss, held, k3 and ratio, then the ratio and minus it for the extremes, the gradient that
    each of its tokens gets, and whether a token counts."""
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    wide = logprobs_ptr.dtype.element_ty
    log_ratios = tl.zeros((BLOCK,), wide)
    divergences = tl.zeros((BLOCK,), wide)
    gains = tl.zeros((BLOCK,), wide)  # advantages that are not negative; a NaN is here
    harms = tl.zeros((BLOCK,), wide)
    num_kept = tl.zeros((BLOCK,), tl.int32)
    num_gains = tl.zeros((BLOCK,), tl.int32)
    num_harms = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, end, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        counts = tokens < end
        if mask_ptr is not None:
            counts = tl.load(mask_ptr + tokens, mask=counts, other=0) != 0
        log_ratio = tl.load(logprobs_ptr + tokens, mask=counts, other=0.0)
        log_ratio -= tl.load(old_logprobs_ptr + tokens, mask=counts, other=0.0)
        advantage = tl.load(advantages_ptr + tokens, mask=counts, other=0.0)
        log_ratios += log_ratio
        divergences += exp_minus_linear(log_ratio)
        gains += tl.where(advantage < 0, 0.0, advantage)
        harms += tl.where(advantage < 0, advantage, 0.0)
        num_kept += counts.to(tl.int32)
        num_gains += (advantage > 0).to(tl.int32)
        num_harms += (advantage < 0).to(tl.int32)
    kept = tl.sum(num_kept, 0)
    better = tl.sum(num_gains, 0)
    worse = tl.sum(num_harms, 0)
    share = 1.0 / tl.maximum(kept, 1).to(tl.float64)
    ratio = tl.exp(tl.sum(log_ratios.to(tl.float64), 0) * share)
    gain = tl.sum(gains.to(tl.float64), 0)
    harm = tl.sum(harms.to(tl.float64), 0)
    # comparisons, which pass a NaN on; a kind without a token stays out, as 0 times an infinite ratio is NaN, and so
    # does an infinite ratio of tokens with advantage 0
    still = tl.where(kept > better + worse, 0.0 * gain * tl.where(ratio > 1, 1.0, ratio), 0.0)
    above = ratio > highest
    raised = tl.where(ratio < lowest, lowest, ratio)
    over = raised > dual_clip  # which is infinite without dual clip
    outside = (ratio < lowest) | over
    loss = still - tl.where(better > 0, gain * tl.where(above, highest, ratio), 0.0)
    loss -= tl.where(worse > 0, harm * tl.where(over, dual_clip, raised), 0.0)
    slope = still - tl.where((better > 0) & (above == 0), gain * ratio, 0.0)
    slope -= tl.where((worse > 0) & (outside == 0), harm * ratio, 0.0)
    held = tl.where(above, better, 0) + tl.where(outside, worse, 0)
    any_kept = kept > 0
    rows_ptr += sequence
    tl.store(rows_ptr, loss * share)
    tl.store(rows_ptr + num_sequences, held.to(tl.float64) * share)
    tl.store(rows_ptr + 2 * num_sequences, tl.sum(divergences.to(tl.float64), 0) * share)
    tl.store(rows_ptr + 3 * num_sequences, tl.where(any_kept, ratio, 0.0))
    tl.store(rows_ptr + 4 * num_sequences, tl.where(any_kept, ratio, float("-inf")))
    tl.store(rows_ptr + 5 * num_sequences, tl.where(any_kept, -ratio, float("-inf")))
    tl.store(rows_ptr + 6 * num_sequences, slope * share * share)
    tl.store(rows_ptr + 7 * num_sequences, any_kept.to(tl.float64))


@triton.jit
def ppo_sequence_loss_kernel(
    cu_seqlens_ptr,
    mask_ptr,
    rows_ptr,
    loss_ptr,
    stats_ptr,
    grad_ptr,
    num_sequences,
    scale: tl.float64,
    COUNT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program 0 writes loss and statistics, the others the gradient, each of every so many sequences.

    scale is 1 / denominator; with COUNT that is the number of sequences in which a token counts."""
    factor = tl.full((), scale, tl.float64)
    if COUNT:
        counting = tl.zeros((SEQUENCES,), tl.float64)
        for earliest in range(0, num_sequences, SEQUENCES):
            sequences = earliest + tl.arange(0, SEQUENCES)
            at = rows_ptr + tl.cast(num_sequences, tl.int64) * 7 + sequences
            counting += tl.load(at, mask=sequences < num_sequences, other=0.0)
        factor /= tl.maximum(tl.sum(counting, 0), 1.0)
    program = tl.program_id(0)
    if program == 0:
        write_totals(rows_ptr, loss_ptr, stats_ptr, num_sequences, factor, SEQUENCES)
    else:
        wide = grad_ptr.dtype.element_ty
        for sequence in range(program - 1, num_sequences, tl.num_programs(0) - 1):
            start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
            end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
            slope = tl.load(rows_ptr + tl.cast(num_sequences, tl.int64) * 6 + sequence)
            each = (slope * factor).to(wide)
            for first in range(start, end, BLOCK):
                tokens = first + tl.arange(0, BLOCK)
                inside = tokens < end
                counts = inside if mask_ptr is None else tl.load(mask_ptr + tokens, mask=inside, other=0) != 0
                tl.store(grad_ptr + tokens, tl.where(counts, each, 0.0), mask=inside)


def ppo_sequence_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss (), stats (5,) and the gradient of logprobs. All contiguous, (R,) but cu_seqlens, the mask bool."""
    num_sequences = cu_seqlens.shape[0] - 1
    loss, stats, grad = logprobs.new_empty(()), logprobs.new_empty(5), torch.empty_like(logprobs)
    rows = logprobs.new_empty(8, num_sequences, dtype=torch.float64)
    bounds = 1.0 - clip_low, 1.0 + clip_high, float("inf") if dual_clip is None else dual_clip
    with torch.cuda.device_of(logprobs):
        if num_sequences:
            tensors = logprobs, old_logprobs, advantages, cu_seqlens, mask, rows
            ppo_sequence_sums_kernel[(num_sequences,)](*tensors, num_sequences, *bounds, BLOCK=BLOCK, num_warps=8)
        ppo_sequence_loss_kernel[(min(num_sequences, MOST_PROGRAMS) + 1,)](
            cu_seqlens,
            mask,
            rows,
            loss,
            stats,
            grad,
            num_sequences,
            1.0 / (denominator or 1.0),
            COUNT=denominator is None,
            SEQUENCES=256,
            BLOCK=BLOCK,
        )
    return loss, stats, grad
