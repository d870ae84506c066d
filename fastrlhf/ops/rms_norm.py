"""The norm of Llama-like layers: rows over their root mean square, times a weight."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import FLOATS, address, dtype_in, dtype_name, has_shape, same_device, same_shape
from fastrlhf.ops._launch import triton
from fastrlhf.ops._registry import leaf, op

triton_kernel = triton("rms_norm")
CHUNKS, CHUNK_ROWS = 64, 16  # the weight's gradient is summed by chunks of rows: at most so many, none smaller


def _normalised(hidden: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return wide * scale, scale


def rms_norm_ref(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    normalised, _ = _normalised(hidden, eps)
    return (normalised * weight.to(normalised.dtype)).to(hidden.dtype)


def rms_norm_backward_ref(grad: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normalised, scale = _normalised(hidden, eps)
    wide = grad.to(normalised.dtype)
    inner = wide * weight.to(normalised.dtype)
    of_hidden = scale * (inner - normalised * (inner * normalised).mean(-1, keepdim=True))
    of_weight = (wide * normalised).reshape(-1, hidden.shape[-1]).sum(0)
    return of_hidden.to(hidden.dtype).contiguous(), of_weight.to(weight.dtype)


def _check(hidden: Tensor, weight: Tensor, eps: float) -> None:
    name = "rms_norm"
    same_device(name, hidden=hidden, weight=weight)
    dtype_in(name, "hidden", hidden, FLOATS)
    dtype_in(name, "weight", weight, (hidden.dtype,))
    if hidden.ndim == 0:
        raise ValueError(f"{name}: hidden must be (..., D), got ()")
    has_shape(name, "weight", weight, (hidden.shape[-1],), "(D,)")


def _check_backward(grad: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> None:
    _check(hidden, weight, eps)
    same_device("rms_norm", grad=grad, hidden=hidden)
    dtype_in("rms_norm", "grad", grad, (hidden.dtype,))
    same_shape("rms_norm", grad=grad, hidden=hidden)


def _fake(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _fake(hidden, weight, eps), torch.empty_like(weight, memory_format=torch.contiguous_format)


def _cpu_forward(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    hidden, weight = hidden.contiguous(), weight.contiguous()
    out, width = torch.empty_like(hidden), weight.shape[0]
    getattr(_cpu, f"rms_norm_{dtype_name(hidden)}")(
        *map(address, (hidden, weight, out)), hidden.numel() // max(width, 1), width, eps, torch.get_num_threads()
    )
    return out


def _cpu_backward(grad: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    grad, hidden, weight = grad.contiguous(), hidden.contiguous(), weight.contiguous()
    of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)
    width = weight.shape[0]
    num_rows = hidden.numel() // max(width, 1)
    rows = max(CHUNK_ROWS, -(-num_rows // CHUNKS))
    sums = weight.new_empty(-(-num_rows // rows), width, dtype=torch.promote_types(weight.dtype, torch.float32))
    getattr(_cpu, f"rms_norm_backward_{dtype_name(hidden)}")(
        *map(address, (grad, hidden, weight, of_hidden, of_weight, sums)),
        num_rows,
        width,
        rows,
        eps,
        torch.get_num_threads(),
    )
    return of_hidden, of_weight


def _cuda_forward(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return triton_kernel.rms_norm(hidden.contiguous(), weight.contiguous(), eps)


def _cuda_backward(grad: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return triton_kernel.rms_norm_backward(grad.contiguous(), hidden.contiguous(), weight.contiguous(), eps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, ctx.eps = inputs
    ctx.save_for_backward(hidden, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_gradient(grad, *ctx.saved_tensors, ctx.eps), None


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape, spread, eps in [
        ((0, 5), 1.0, 1e-6),
        ((1, 1), 1.0, 1e-5),
        ((3, 2, 7), 0.01, 1e-5),
        ((20, 64), 30.0, 1e-6),
        ((40, 301), 1.0, 1e-6),
    ]:
        hidden = spread * torch.randn(shape, generator=generator)
        weight = 1 + 0.2 * torch.randn(shape[-1:], generator=generator)
        yield hidden.to(device, dtype), weight.to(device, dtype), eps


_gradient = leaf(
    "rms_norm_backward(Tensor grad, Tensor hidden, Tensor weight, float eps) -> (Tensor, Tensor)",
    ref=rms_norm_backward_ref,
    fake=_fake_backward,
    cpu=_cpu_backward,
    cuda=_cuda_backward if triton_kernel else None,
    check=_check_backward,
)
_op = op(
    "rms_norm(Tensor hidden, Tensor weight, float eps) -> Tensor",
    ref=rms_norm_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=_cuda_forward if triton_kernel else None,
    check=_check,
    samples=samples,
    grads=("hidden", "weight"),
    setup_context=_setup_context,
    backward=_backward,
)


def rms_norm(hidden: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Returns each row over its root mean square, times a weight, like hidden.

    out[t, d] = weight[d] hidden[t, d] / sqrt(mean over d of hidden[t, d]^2 + eps)

    hidden: (..., D) float32|float64|bfloat16|float16
    weight: (D,) of the same dtype
    eps: at least 0

    Both tensors get a gradient; nothing but them is kept for it. Half precision is computed in float32 and rounded
    once (transformers rounds before the weight, too). NaN in, NaN out.
    Raises: ValueError for shapes, devices or eps, TypeError for dtypes.
    Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"rms_norm: eps must be a number from 0 up, got {eps}")
    return _op(hidden, weight, eps)
