"""Rows over their root mean square, times a weight; the gradient in one read of the rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

STRIPES = 1024  # programs of the backward, each of which sums the weight's gradient over the rows of its stripe


@triton.jit
def rms_norm_kernel(hidden_ptr, weight_ptr, out_ptr, width, eps: tl.float64, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row, all of it at once."""
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(hidden_ptr + start + columns, mask=inside, other=0.0).to(WIDE)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + tl.full((), eps, WIDE))
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(WIDE)
    tl.store(out_ptr + start + columns, x * scale * weight, mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr,
    hidden_ptr,
    weight_ptr,
    of_hidden_ptr,
    sums_ptr,
    num_rows,
    width,
    eps: tl.float64,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a stripe of rows: with n = x scale, x gets scale (g w - n mean(g w n)), and sums[stripe] sum g n."""
    stripe = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(WIDE)
    sums = tl.zeros((BLOCK,), WIDE)
    for row in range(stripe, num_rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * width
        x = tl.load(hidden_ptr + start + columns, mask=inside, other=0.0).to(WIDE)
        grad = tl.load(grad_ptr + start + columns, mask=inside, other=0.0).to(WIDE)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + tl.full((), eps, WIDE))
        n = x * scale
        inner = grad * weight
        tl.store(of_hidden_ptr + start + columns, scale * (inner - n * (tl.sum(inner * n, 0) / width)), mask=inside)
        sums += grad * n
    tl.store(sums_ptr + stripe.to(tl.int64) * width + columns, sums, mask=inside)


def _options(width: int, dtype: torch.dtype) -> dict[str, object]:
    block = triton.next_power_of_2(width)
    warps = min(max(block // 256, 1), 32)
    return {"WIDE": tl.float64 if dtype == torch.float64 else tl.float32, "BLOCK": block, "num_warps": warps}


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden: (..., D) and weight: (D,), contiguous and of one dtype."""
    out, width = torch.empty_like(hidden), weight.shape[0]
    if out.numel():
        with torch.cuda.device_of(hidden):
            grid = (out.numel() // width,)
            rms_norm_kernel[grid](hidden, weight, out, width, eps, **_options(width, hidden.dtype))
    return out


def rms_norm_backward(grad: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the gradients of hidden and weight; all contiguous and of one dtype."""
    of_hidden, width = torch.empty_like(hidden), weight.shape[0]
    num_rows = hidden.numel() // max(width, 1)
    stripes = min(num_rows, STRIPES)
    sums = weight.new_empty(stripes, width, dtype=torch.promote_types(weight.dtype, torch.float32))
    if num_rows:
        with torch.cuda.device_of(hidden):
            rms_norm_backward_kernel[(stripes,)](
                grad, hidden, weight, of_hidden, sums, num_rows, width, eps, **_options(width, hidden.dtype)
            )
    return of_hidden, sums.sum(0).to(weight.dtype)
