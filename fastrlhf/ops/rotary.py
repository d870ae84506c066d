"""Rotary position embedding of queries or keys."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import FLOATS, address, dtype_in, dtype_name, has_shape, same_device, same_shape
from fastrlhf.ops._launch import triton
from fastrlhf.ops._registry import op

triton_kernel = triton("rotary")


def rotary_ref(states: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    wide = torch.promote_types(states.dtype, torch.float32)
    x, c, s = states.to(wide), cos.to(wide)[:, None], sin.to(wide)[:, None]
    turned = x * s if transposed else x
    first, second = turned.chunk(2, -1)
    turned = torch.cat([second, -first] if transposed else [-second, first], -1)
    return (x * c + (turned if transposed else turned * s)).to(states.dtype)


def _check(states: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> None:
    name = "rotary"
    same_device(name, states=states, cos=cos, sin=sin)
    dtype_in(name, "states", states, FLOATS)
    has_shape(name, "states", states, (None, None, None), "(T, H, K)")
    if states.shape[2] % 2:
        raise ValueError(f"{name}: K must be even, got {states.shape[2]}")
    has_shape(name, "cos", cos, (states.shape[0], states.shape[2]), "(T, K)")
    same_shape(name, cos=cos, sin=sin)
    for what, tensor in (("cos", cos), ("sin", sin)):
        dtype_in(name, what, tensor, (states.dtype,))


def _fake(states: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(states, memory_format=torch.contiguous_format)


def _cpu_forward(states: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    states, cos, sin = states.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(states)
    getattr(_cpu, f"rotary_{dtype_name(states)}")(
        *map(address, (states, cos, sin, out)), *states.shape, int(transposed), torch.get_num_threads()
    )
    return out


def _cuda_forward(states: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    return triton_kernel.rotary(states.contiguous(), cos.contiguous(), sin.contiguous(), transposed)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _op.forward(grad, *ctx.saved_tensors, not ctx.transposed), None, None, None


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for num_tokens, heads, width in [(0, 2, 4), (1, 1, 2), (5, 3, 6), (9, 2, 64), (7, 1, 80)]:
        states = torch.randn(num_tokens, heads, width, generator=generator).to(device, dtype)
        # halves that differ, as no model has them, so that each is seen to be taken
        cos, sin = (torch.randn(num_tokens, width, generator=generator).to(device, dtype) for _ in range(2))
        yield states, cos, sin, False
        yield states, cos, sin, True


_op = op(
    "rotary(Tensor states, Tensor cos, Tensor sin, bool transposed) -> Tensor",
    ref=rotary_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=_cuda_forward if triton_kernel else None,
    check=_check,
    samples=samples,
    grads=("states",),
    setup_context=_setup_context,
    backward=_backward,
)


def rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns queries or keys turned by angles that grow with their position, like states.

    out[t, h, d] = states[t, h, d] cos[t, d] + r[t, h, d] sin[t, d], where r[t, h, d] is -states[t, h, d + K/2] in the
    first half of K and states[t, h, d - K/2] in the second

    states: (T, H, K) float32|float64|bfloat16|float16, K even
    cos, sin: (T, K) of the same dtype, those of the angle of each token in each place

    Only `states` gets a gradient; cos and sin must be detached. Half precision is computed in float32 and rounded once.
    Raises: ValueError for shapes, devices or a cos that wants a gradient, TypeError for dtypes.
    Source: Su et al., arXiv 2104.09864; halves rather than neighbours are paired, as in GPT-NeoX.
    """
    return _op(states, cos, sin, False)
