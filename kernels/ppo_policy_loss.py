"""The clipped surrogate of PPO with its statistics and its gradient, in one pass over the tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrlhf.kernels.approx_kl import exp_minus_linear

BLOCK = 1024


@triton.jit
def ppo_policy_loss_kernel(
    logprobs_ptr,
    old_logprobs_ptr,
    advantages_ptr,
    mask_ptr,
    count_ptr,
    partials_ptr,
    grad_ptr,
    num_tokens,
    lowest: tl.float64,
    highest: tl.float64,
    dual_clip: tl.float64,
    scale: tl.float64,
    BLOCK: tl.constexpr,
):
    """One program a block of tokens: their gradient, and partials (6, blocks) of loss, held, k3, ratio, max and -min.

    scale is 1 / denominator, or where there is a count, over it."""
    block = tl.program_id(0)
    tokens = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < num_tokens
    wide = logprobs_ptr.dtype.element_ty
    counts = inside if mask_ptr is None else tl.load(mask_ptr + tokens, mask=inside, other=0) != 0
    factor = tl.full((), scale, tl.float64)
    if count_ptr is not None:
        factor /= tl.maximum(tl.load(count_ptr), 1).to(tl.float64)
    log_ratio = tl.load(logprobs_ptr + tokens, mask=counts, other=0.0)
    log_ratio -= tl.load(old_logprobs_ptr + tokens, mask=counts, other=0.0)
    advantage = tl.load(advantages_ptr + tokens, mask=counts, other=0.0)
    ratio = tl.exp(log_ratio)
    # comparisons rather than a minimum and a maximum, which would lose a NaN
    low, high = tl.full((), lowest, wide), tl.full((), highest, wide)
    bounded = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    # with advantage 0 any ratio gives 0, also one that overflows; a NaN stays
    plain = -advantage * tl.where((advantage == 0) & (ratio > 1), 1.0, ratio)
    clipped = -advantage * bounded
    limit = -advantage * tl.full((), dual_clip, wide)  # infinite without dual clip
    loss = tl.where(clipped > plain, clipped, plain)
    over = (advantage < 0) & (loss > limit)
    held = (clipped > plain) | over
    tl.store(grad_ptr + tokens, tl.where(held, 0.0, plain * factor.to(wide)), mask=inside)
    partials_ptr += block
    num_blocks = tl.num_programs(0)
    tl.store(partials_ptr, tl.sum(tl.where(over, limit, loss), 0))
    tl.store(partials_ptr + num_blocks, tl.sum(held.to(wide), 0))
    tl.store(partials_ptr + 2 * num_blocks, tl.sum(exp_minus_linear(log_ratio), 0))
    tl.store(partials_ptr + 3 * num_blocks, tl.sum(tl.where(counts, ratio, 0.0), 0))
    tl.store(partials_ptr + 4 * num_blocks, tl.max(tl.where(counts, ratio, float("-inf")), 0))
    tl.store(partials_ptr + 5 * num_blocks, tl.max(tl.where(counts, -ratio, float("-inf")), 0))


@triton.jit
def write_totals(partials_ptr, loss_ptr, stats_ptr, num_blocks, factor, BLOCK: tl.constexpr):
    """Row 0 of the partials is the loss, rows 1 to 3 are sums, row 4 a maximum, row 5 that of -ratio."""
    rows = tl.arange(0, 8)
    row_size = tl.cast(num_blocks, tl.int64)
    sums = tl.zeros((8, BLOCK), tl.float64)
    extremes = tl.full((8, BLOCK), float("-inf"), tl.float64)
    for start in range(0, num_blocks, BLOCK):
        blocks = start + tl.arange(0, BLOCK)[None, :]
        inside = (rows[:, None] < 6) & (blocks < num_blocks)
        tile = tl.load(partials_ptr + rows[:, None] * row_size + blocks, mask=inside, other=0.0).to(tl.float64)
        sums += tile
        extremes = tl.maximum(extremes, tl.where(inside, tile, float("-inf")))
    sums, extremes = tl.sum(sums, 1), tl.max(extremes, 1)
    sum_ratio = tl.sum(tl.where(rows == 3, sums, 0.0), 0)
    # without a token that counts they are 0; a comparison loses a NaN, the sum of the ratios does not
    extremes = tl.where(rows == 5, -extremes, extremes)
    extremes = tl.where(sum_ratio == 0, 0.0, tl.where(sum_ratio == sum_ratio, extremes, float("nan")))
    results = tl.where(rows < 4, sums * factor, extremes)
    tl.store(loss_ptr + rows, results, mask=rows == 0)
    tl.store(stats_ptr + rows - 1, results, mask=(rows > 0) & (rows < 6))


@triton.jit
def ppo_policy_loss_total_kernel(
    partials_ptr, count_ptr, loss_ptr, stats_ptr, num_blocks, scale: tl.float64, BLOCK: tl.constexpr
):
    """One program."""
    factor = tl.full((), scale, tl.float64)
    if count_ptr is not None:
        factor /= tl.maximum(tl.load(count_ptr), 1).to(tl.float64)
    write_totals(partials_ptr, loss_ptr, stats_ptr, num_blocks, factor, BLOCK)


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss (), stats (5,) and the gradient of logprobs. All contiguous and of one shape, the mask bool."""
    num_tokens = logprobs.numel()
    num_blocks = triton.cdiv(num_tokens, BLOCK)
    loss, stats, grad = logprobs.new_empty(()), logprobs.new_empty(5), torch.empty_like(logprobs)
    partials = logprobs.new_empty(6, num_blocks)
    count = mask.sum() if denominator is None and mask is not None else None
    scale = 1.0 if count is not None else 1.0 / (denominator or max(num_tokens, 1))
    with torch.cuda.device_of(logprobs):
        if num_blocks:
            ppo_policy_loss_kernel[(num_blocks,)](
                logprobs,
                old_logprobs,
                advantages,
                mask,
                count,
                partials,
                grad,
                num_tokens,
                1.0 - clip_low,
                1.0 + clip_high,
                float("inf") if dual_clip is None else dual_clip,
                scale,
                BLOCK=BLOCK,
            )
        ppo_policy_loss_total_kernel[(1,)](partials, count, loss, stats, num_blocks, scale, BLOCK=256)
    return loss, stats, grad
