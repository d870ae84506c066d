"""silu(gate) up and its gradient: one program a block of elements."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), and 1 minus that without cancellation."""
    e = tl.exp(-tl.abs(x))
    share = 1.0 / (1.0 + e)
    other = e * share
    return tl.where(x < 0, other, share), tl.where(x < 0, share, other)


@triton.jit
def silu_mul_kernel(gate_ptr, up_ptr, out_ptr, size, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(gate_ptr + at, mask=inside, other=0.0).to(WIDE)
    share, _ = sigmoid(x)
    tl.store(out_ptr + at, x * share * tl.load(up_ptr + at, mask=inside, other=0.0).to(WIDE), mask=inside)


@triton.jit
def silu_mul_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, of_gate_ptr, of_up_ptr, size, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(gate_ptr + at, mask=inside, other=0.0).to(WIDE)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(WIDE)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(WIDE)
    share, rest = sigmoid(x)
    tl.store(of_gate_ptr + at, grad * up * (share + x * share * rest), mask=inside)
    tl.store(of_up_ptr + at, grad * (x * share), mask=inside)


def _wide(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Both contiguous, of one shape and dtype."""
    out = torch.empty_like(gate)
    if out.numel():
        grid = (triton.cdiv(out.numel(), BLOCK),)
        with torch.cuda.device_of(gate):
            silu_mul_kernel[grid](gate, up, out, out.numel(), WIDE=_wide(gate), BLOCK=BLOCK)
    return out


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of gate and up; all contiguous, of one shape and dtype."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        grid = (triton.cdiv(gate.numel(), BLOCK),)
        with torch.cuda.device_of(gate):
            silu_mul_backward_kernel[grid](grad, gate, up, of_gate, of_up, gate.numel(), WIDE=_wide(gate), BLOCK=BLOCK)
    return of_gate, of_up
