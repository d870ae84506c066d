"""The activation of gated layers (SwiGLU): silu(gate) up."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import FLOATS, address, alike, dtype_name
from fastrlhf.ops._launch import triton
from fastrlhf.ops._registry import leaf, op

triton_kernel = triton("silu_mul")


def silu_mul_ref(gate: Tensor, up: Tensor) -> Tensor:
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def silu_mul_backward_ref(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(gate.dtype, torch.float32)
    x, g = gate.to(wide), grad.to(wide)
    share, rest = x.sigmoid(), (-x).sigmoid()
    of_gate, of_up = g * up.to(wide) * (share + x * share * rest), g * (x * share)
    return of_gate.to(gate.dtype).contiguous(), of_up.to(up.dtype).contiguous()


def _check(gate: Tensor, up: Tensor) -> None:
    alike("silu_mul", FLOATS, {"gate": gate, "up": up})


def _check_backward(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    alike("silu_mul", FLOATS, {"gate": gate, "up": up, "grad": grad})


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _fake(gate, up), _fake(gate, up)


def _cpu_forward(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    getattr(_cpu, f"silu_mul_{dtype_name(gate)}")(*map(address, (gate, up, out)), out.numel(), torch.get_num_threads())
    return out


def _cpu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    getattr(_cpu, f"silu_mul_backward_{dtype_name(gate)}")(
        *map(address, (grad, gate, up, of_gate, of_up)), gate.numel(), torch.get_num_threads()
    )
    return of_gate, of_up


def _cuda_forward(gate: Tensor, up: Tensor) -> Tensor:
    return triton_kernel.silu_mul(gate.contiguous(), up.contiguous())


def _cuda_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return triton_kernel.silu_mul_backward(grad.contiguous(), gate.contiguous(), up.contiguous())


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _gradient(grad, *ctx.saved_tensors)


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape, spread in [((0, 5), 1.0), ((1,), 1.0), ((2, 3, 7), 30.0), ((301,), 3.0), ((70, 520), 1.0)]:
        gate, up = (spread * torch.randn(shape, generator=generator) for _ in range(2))
        yield gate.to(device, dtype), up.to(device, dtype)


_gradient = leaf(
    "silu_mul_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    ref=silu_mul_backward_ref,
    fake=_fake_backward,
    cpu=_cpu_backward,
    cuda=_cuda_backward if triton_kernel else None,
    check=_check_backward,
)
_op = op(
    "silu_mul(Tensor gate, Tensor up) -> Tensor",
    ref=silu_mul_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=_cuda_forward if triton_kernel else None,
    check=_check,
    samples=samples,
    grads=("gate", "up"),
    setup_context=_setup_context,
    backward=_backward,
)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Returns the activation of a gated layer, like gate.

    out = silu(gate) up,  silu(x) = x / (1 + e^-x)

    gate: (...) float32|float64|bfloat16|float16
    up: like gate

    Both get a gradient; nothing but them is kept for it. Half precision is computed in float32 and rounded once.
    NaN in, NaN out.
    Raises: ValueError for shapes or devices that differ, TypeError for dtypes.
    Source: Shazeer, arXiv 2002.05202.
    """
    return _op(gate, up)
