"""The clipped squared error of PPO's value function."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import WIDE, address, alike, contiguous, denominator_of, dtype_name, widen
from fastrlhf.ops._launch import triton
from fastrlhf.ops._loss import keep_gradients, named, scale_gradients
from fastrlhf.ops._registry import op

triton_kernel = triton("value_loss")
STATS = ("clip_fraction", "error")


def value_loss_ref(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    clip_range: float | None,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    count = kept.sum().clamp(min=1).to(values.dtype) if denominator is None else denominator
    values, old_values, returns = (torch.where(kept, x, 0) for x in (values, old_values, returns))
    bounded = values if clip_range is None else values.clamp(old_values - clip_range, old_values + clip_range)
    plain, clipped = (values - returns).square(), (bounded - returns).square()
    loss = torch.maximum(plain, clipped).sum() / (2 * count)
    with torch.no_grad():
        clips = (clipped > plain) | (clipped.isnan() & ~plain.isnan())  # by a NaN of old_values alone
        stats = torch.stack([clips.sum(dtype=plain.dtype) / count, plain.sum() / count])
        grad = torch.where(clips, 0, (values - returns) / count)
    return loss, stats, grad.contiguous()


def _check(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor | None, *_: Any) -> None:
    alike("value_loss", WIDE, {"values": values, "old_values": old_values, "returns": returns}, mask)


def _fake(values: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.empty_like(values, memory_format=torch.contiguous_format)
    return values.new_empty(()), values.new_empty(len(STATS)), grad


def _cpu_forward(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    clip_range: float | None,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    values, old_values, returns = values.contiguous(), old_values.contiguous(), returns.contiguous()
    mask = None if mask is None else mask.contiguous()
    loss, stats, grad = _fake(values)
    getattr(_cpu, f"value_loss_{dtype_name(values)}")(
        values.data_ptr(),
        old_values.data_ptr(),
        returns.data_ptr(),
        address(mask),
        loss.data_ptr(),
        stats.data_ptr(),
        grad.data_ptr(),
        values.numel(),
        math.inf if clip_range is None else clip_range,
        denominator or 0.0,
        torch.get_num_threads(),
    )
    return loss, stats, grad


def _cuda_forward(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return triton_kernel.value_loss(*contiguous(values, old_values, returns, mask), *options)


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape in [(0,), (1,), (7, 3), (301,), (5000,)]:
        old_values, step, returns = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
        values = old_values + 0.3 * step
        yield values, old_values, returns, None, 0.2, None
        mask = (torch.rand(shape, generator=generator) < 0.6).to(device)
        yield values, old_values, returns, mask, None, None
        yield values, old_values, returns, mask, 0.1, 77.0
    yield values, old_values, returns, torch.zeros_like(mask), 0.2, None


_op = op(
    "value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor? mask, float? clip_range, float? denominator)"
    " -> (Tensor, Tensor, Tensor)",
    ref=value_loss_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=_cuda_forward if triton_kernel else None,
    check=_check,
    samples=samples,
    grads=("values",),
    setup_context=keep_gradients,
    backward=scale_gradients,
)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip_range: float | None = 0.2,
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss, stats) of PPO's value function.

    loss = sum over the mask of max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / (2 denominator).

    values: (...) float32|float64, V of the state before each response token; half precision becomes float32
    old_values: like values, V when the advantages were computed
    returns: like values, R
    mask: (...) bool, True where a token counts; other tokens are not looked at and get gradient 0
    clip_range: c; None for the plain squared error, which does not look at old_values
    denominator: the number of tokens of the whole optimizer step, so that the losses and stats of micro-batches add up
        to those of the whole; without it the number of tokens that count here

    stats, detached: clip_fraction (tokens whose clipped term is the larger) and error ((V - R)^2) are sums over the
    mask / denominator. With nothing to count loss and stats are 0.

    Only `values` gets a gradient; the others must be detached. NaN in, NaN out where the mask is True.
    Raises: ValueError for shapes, devices, clip_range or denominator, TypeError for dtypes.
    Source: Schulman et al., arXiv 1506.02438 for the target; the clipping is that of OpenAI's `baselines`, ppo2.
    """
    values, old_values, returns = widen(values), widen(old_values), widen(returns)
    denominator_of("value_loss", denominator)
    if clip_range is not None and not 0 <= clip_range < math.inf:
        raise ValueError(f"value_loss: clip_range must be a number from 0 up, or None, got {clip_range}")
    loss, stats, _ = _op(values, old_values, returns, mask, clip_range, denominator)
    return loss, named(STATS, stats)
