"""The clipped squared error of a value function with its statistics and its gradient, in one pass over the tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def value_loss_kernel(
    values_ptr,
    old_values_ptr,
    returns_ptr,
    mask_ptr,
    count_ptr,
    partials_ptr,
    grad_ptr,
    num_tokens,
    clip_range: tl.float64,
    scale: tl.float64,
    CLIPPING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of tokens: their gradient, and partials (3, blocks) of the larger error, clips, plain error.

    scale is 1 / denominator, or where there is a count, over it."""
    block = tl.program_id(0)
    tokens = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < num_tokens
    wide = values_ptr.dtype.element_ty
    counts = inside if mask_ptr is None else tl.load(mask_ptr + tokens, mask=inside, other=0) != 0
    factor = tl.full((), scale, tl.float64)
    if count_ptr is not None:
        factor /= tl.maximum(tl.load(count_ptr), 1).to(tl.float64)
    value = tl.load(values_ptr + tokens, mask=counts, other=0.0)
    target = tl.load(returns_ptr + tokens, mask=counts, other=0.0)
    error = value - target
    plain = error * error
    larger = plain
    clips = tokens < 0
    if CLIPPING:
        old_value = tl.load(old_values_ptr + tokens, mask=counts, other=0.0)
        clip = tl.full((), clip_range, wide)
        lowest, highest = old_value - clip, old_value + clip
        bounded = tl.where(value > lowest, tl.where(value < highest, value, highest), lowest)
        clipped = (bounded - target) * (bounded - target)
        # a NaN of old_value is in `clipped` alone, any other is in `plain`: both must reach the loss
        clips = ((clipped > plain) | (clipped != clipped)) & (plain == plain)
        larger = tl.where(clips, clipped, plain)
    tl.store(grad_ptr + tokens, tl.where(clips, 0.0, error * factor.to(wide)), mask=inside)
    partials_ptr += block
    num_blocks = tl.num_programs(0)
    tl.store(partials_ptr, tl.sum(larger, 0))
    tl.store(partials_ptr + num_blocks, tl.sum(clips.to(wide), 0))
    tl.store(partials_ptr + 2 * num_blocks, tl.sum(plain, 0))


@triton.jit
def value_loss_total_kernel(
    partials_ptr, count_ptr, loss_ptr, stats_ptr, num_blocks, scale: tl.float64, BLOCK: tl.constexpr
):
    """One program: row 0 of the partials is twice the loss, rows 1 and 2 are the statistics."""
    factor = tl.full((), scale, tl.float64)
    if count_ptr is not None:
        factor /= tl.maximum(tl.load(count_ptr), 1).to(tl.float64)
    rows = tl.arange(0, 4)
    sums = tl.zeros((4, BLOCK), tl.float64)
    for start in range(0, num_blocks, BLOCK):
        blocks = start + tl.arange(0, BLOCK)[None, :]
        inside = (rows[:, None] < 3) & (blocks < num_blocks)
        sums += tl.load(partials_ptr + rows[:, None] * num_blocks + blocks, mask=inside, other=0.0).to(tl.float64)
    sums = tl.sum(sums, 1)
    tl.store(loss_ptr + rows, 0.5 * sums * factor, mask=rows == 0)
    tl.store(stats_ptr + rows - 1, sums * factor, mask=(rows > 0) & (rows < 3))


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    clip_range: float | None,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss (), stats (2,) and the gradient of values. All contiguous and of one shape, the mask bool."""
    num_tokens = values.numel()
    num_blocks = triton.cdiv(num_tokens, BLOCK)
    loss, stats, grad = values.new_empty(()), values.new_empty(2), torch.empty_like(values)
    partials = values.new_empty(3, num_blocks)
    count = mask.sum() if denominator is None and mask is not None else None
    scale = 1.0 if count is not None else 1.0 / (denominator or max(num_tokens, 1))
    with torch.cuda.device_of(values):
        if num_blocks:
            value_loss_kernel[(num_blocks,)](
                values,
                old_values,
                returns,
                mask,
                count,
                partials,
                grad,
                num_tokens,
                clip_range or 0.0,
                scale,
                CLIPPING=clip_range is not None,
                BLOCK=BLOCK,
            )
        value_loss_total_kernel[(1,)](partials, count, loss, stats, num_blocks, scale, BLOCK=256)
    return loss, stats, grad
