"""Log-probability of a target and entropy of each row of logits in one read; their gradient in one read and write."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e4)  # stands for log 0, so that 0 log 0 is 0


@triton.jit
def finite_log(x):
    """A logarithm that is not -inf; NaN stays NaN."""
    return tl.where(x < LOWEST, LOWEST, x)


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0 without cancellation: near 0 its Taylor series, whose first missing term is below 2^-53."""
    series = 1.0 + x * (1.0 / 15)
    for i in tl.static_range(13):
        series = 1.0 + x * (1.0 / (14 - i)) * series
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def token_logprobs_kernel(
    logits_ptr,
    targets_ptr,
    temperature_ptr,
    logprobs_ptr,
    entropy_ptr,
    highest_ptr,
    log_sum_ptr,
    size,
    stride,
    temperature_step,
    BLOCK: tl.constexpr,
):
    """One program a row, whose maximum may rise with every block of columns; sums stay apart by lane until the end.

    With z = (x - highest) / temperature: log_sum = log sum e^z, logprob = z_y - log_sum, entropy = log_sum - sum p z.
    """
    row = tl.program_id(0).to(tl.int64)
    wide = temperature_ptr.dtype.element_ty
    logits_ptr += row * stride
    scale = 1.0 / tl.load(temperature_ptr + row * temperature_step)
    scale_2 = scale * LOG2E  # the loop's logarithms are of base 2
    highest = tl.full((), float("-inf"), wide)
    exps = tl.zeros((BLOCK,), wide)
    weighted = tl.zeros((BLOCK,), wide)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + columns, mask=columns < size, other=float("-inf")).to(wide)
        block_highest = tl.max(x, 0)  # passes over NaN, which comes back in the sum of exponentials
        if block_highest > highest:
            shift = (highest - block_highest) * scale_2
            factor = tl.exp2(shift)
            weighted = tl.where(factor > 0, factor * (weighted + exps * shift), 0.0)
            exps *= factor
            highest = block_highest
        z = finite_log((x - tl.where(highest == float("-inf"), 0.0, highest)) * scale_2)
        e = tl.exp2(z)
        exps += e
        weighted += e * z
    total = tl.sum(exps, 0)
    log_sum = tl.log(total)
    target = tl.load(targets_ptr + row)
    x = tl.load(logits_ptr + target, mask=(target >= 0) & (target < size), other=float("nan")).to(wide)
    tl.store(logprobs_ptr + row, (x - highest) * scale - log_sum)
    tl.store(entropy_ptr + row, log_sum - LN2 * tl.sum(weighted, 0) / total)
    tl.store(highest_ptr + row, highest)
    tl.store(log_sum_ptr + row, log_sum)


@triton.jit
def token_logprobs_backward_kernel(
    grad_logprobs_ptr,
    grad_entropy_ptr,
    logits_ptr,
    targets_ptr,
    temperature_ptr,
    entropy_ptr,
    highest_ptr,
    log_sum_ptr,
    grads_ptr,
    size,
    stride,
    grad_stride,
    temperature_step,
    num_blocks,
    BLOCK: tl.constexpr,
):
    """One program a block of columns of a row. But for the target's, grad_z_v = -p_v (g + h (log p_v + entropy)).

    grads may be the logits: a program reads all of its block before it writes."""
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    start = tl.program_id(0) % num_blocks * BLOCK
    columns = start + tl.arange(0, BLOCK)
    wide = temperature_ptr.dtype.element_ty
    logits_ptr += row * stride
    grads_ptr += row * grad_stride
    target = tl.load(targets_ptr + row)
    g = tl.zeros((), wide) if grad_logprobs_ptr is None else tl.load(grad_logprobs_ptr + row)
    h = tl.zeros((), wide) if grad_entropy_ptr is None else tl.load(grad_entropy_ptr + row)
    g = tl.where((target >= 0) & (target < size), g, float("nan"))
    if (g == 0) & (h == 0):
        tl.store(grads_ptr + columns, tl.zeros((BLOCK,), wide), mask=columns < size)
    else:
        scale = 1.0 / tl.load(temperature_ptr + row * temperature_step)
        entropy = tl.load(entropy_ptr + row)
        x = tl.load(logits_ptr + columns, mask=columns < size, other=0.0).to(wide)
        log_p = (x - tl.load(highest_ptr + row)) * scale - tl.load(log_sum_ptr + row)
        slope = g
        if grad_entropy_ptr is not None:
            slope += h * (finite_log(log_p) + entropy)
        grads = -tl.exp2(log_p * LOG2E) * slope
        if (target >= start) & (target < start + BLOCK):
            # summed rather than loaded, as another thread may have written its gradient there already
            log_p_y = tl.sum(tl.where(columns == target, log_p, 0.0), 0)
            of_entropy = tl.exp(log_p_y) * (finite_log(log_p_y) + entropy)
            grads = tl.where(columns == target, -g * expm1(log_p_y) - h * of_entropy, grads)
        tl.store(grads_ptr + columns, grads * scale, mask=columns < size)


def block_of(size: int) -> int:
    """Columns that one program reads at once."""
    return min(4096, max(256, triton.next_power_of_2(size)))


def token_logprobs(logits: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns logprobs, entropy, highest and log_sum, each (T,) and of the dtype of temperature.

    logits: (T, V), rows of consecutive elements; targets: (T,) int64; temperature: (T,) or (1,)"""
    num_rows, size = logits.shape
    logprobs, entropy, highest, log_sum = (temperature.new_empty(num_rows) for _ in range(4))
    if num_rows:
        with torch.cuda.device_of(logits):
            token_logprobs_kernel[(num_rows,)](
                logits,
                targets,
                temperature,
                logprobs,
                entropy,
                highest,
                log_sum,
                size,
                logits.stride(0),
                int(temperature.shape[0] > 1),
                BLOCK=block_of(size),
                num_warps=8,
            )
    return logprobs, entropy, highest, log_sum


def token_logprobs_backward(upstream: list[Tensor | None], logits: Tensor, saved: list[Tensor], grads: Tensor) -> None:
    """Writes the gradient to `grads`, of the shape and dtype of logits, which it may be.

    upstream: the gradients of logprobs and entropy; saved: targets, temperature, entropy, highest and log_sum; each
    contiguous"""
    targets, temperature, *statistics = saved
    num_rows, size = logits.shape
    block = block_of(size)
    num_blocks = triton.cdiv(size, block)
    if num_rows:
        with torch.cuda.device_of(logits):
            token_logprobs_backward_kernel[(num_rows * num_blocks,)](
                *upstream,
                logits,
                targets,
                temperature,
                *statistics,
                grads,
                size,
                logits.stride(0),
                grads.stride(0),
                int(temperature.shape[0] > 1),
                num_blocks,
                BLOCK=block,
                num_warps=8,
            )
