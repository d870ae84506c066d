"""The clipped surrogate loss of PPO."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import (
    address,
    denominator_of,
    dtype_in,
    dtype_name,
    mask_of,
    same_device,
    same_shape,
    widen,
)
from fastrlhf.ops._registry import leaf, op
from fastrlhf.ops.approx_kl import exp_minus_linear

try:
    from fastrlhf.kernels import ppo_policy_loss as triton_kernel
except ImportError:  # without Triton the reference serves CUDA
    triton_kernel = None  # type: ignore[assignment]

FLOATS = (torch.float32, torch.float64)
STATS = ("clip_fraction", "approx_kl", "ratio", "ratio_max", "ratio_min")


def _largest(x: Tensor, kept: Tensor) -> Tensor:
    """The largest kept element, 0 without one."""
    padded = torch.cat([torch.where(kept, x, -torch.inf).flatten(), x.new_full((1,), -torch.inf)])
    return torch.where(kept.any(), padded.amax(), 0)


def ppo_policy_loss_ref(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip_low: float,
    clip_high: float,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    count = kept.sum().clamp(min=1).to(logprobs.dtype) if denominator is None else denominator
    log_ratio = torch.where(kept, logprobs - old_logprobs, 0)
    advantages = torch.where(kept, advantages, 0)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped).sum() / count
    with torch.no_grad():
        clips = clipped > plain
        sums = (clips.to(ratio.dtype), exp_minus_linear(log_ratio), torch.where(kept, ratio, 0))
        extremes = _largest(ratio, kept), -_largest(-ratio, kept)
        stats = torch.stack([*(x.sum() / count for x in sums), *extremes])
        grad = torch.where(clips, 0, plain / count)
    return loss, stats, grad.contiguous()


def _check(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None) -> None:
    name = "ppo_policy_loss"
    same_device(name, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    dtype_in(name, "logprobs", logprobs, FLOATS)
    dtype_in(name, "old_logprobs", old_logprobs, (logprobs.dtype,))
    dtype_in(name, "advantages", advantages, (logprobs.dtype,))
    same_shape(name, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    mask_of(name, mask, logprobs=logprobs)


def _fake(logprobs: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.empty_like(logprobs, memory_format=torch.contiguous_format)
    return logprobs.new_empty(()), logprobs.new_empty(len(STATS)), grad


def _cpu_forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip_low: float,
    clip_high: float,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(logprobs, old_logprobs, advantages, mask)
    logprobs, old_logprobs, advantages = logprobs.contiguous(), old_logprobs.contiguous(), advantages.contiguous()
    mask = None if mask is None else mask.contiguous()
    loss, stats, grad = _fake(logprobs)
    kernel = getattr(_cpu, f"ppo_policy_loss_{dtype_name(logprobs)}")
    kernel(
        logprobs.data_ptr(),
        old_logprobs.data_ptr(),
        advantages.data_ptr(),
        address(mask),
        loss.data_ptr(),
        stats.data_ptr(),
        grad.data_ptr(),
        logprobs.numel(),
        clip_low,
        clip_high,
        denominator or 0.0,
        torch.get_num_threads(),
    )
    return loss, stats, grad


def _cuda_forward(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _check(logprobs, old_logprobs, advantages, mask)
    tensors: list[Any] = [None if t is None else t.contiguous() for t in (logprobs, old_logprobs, advantages, mask)]
    return triton_kernel.ppo_policy_loss(*tensors, *options)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, stats, grad = output
    ctx.mark_non_differentiable(stats, grad)
    ctx.save_for_backward(grad)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    (grad,) = ctx.saved_tensors
    return grad_loss * grad, None, None, None, None, None, None


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape in [(0,), (1,), (7, 3), (301,), (5000,)]:
        old_logprobs, step, advantages = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
        logprobs = old_logprobs + 0.3 * step
        yield logprobs, old_logprobs, advantages, None, 0.2, 0.2, None
        mask = (torch.rand(shape, generator=generator) < 0.6).to(device)
        yield logprobs, old_logprobs, advantages, mask, 0.2, 0.28, None
        yield logprobs, old_logprobs, advantages, mask, 0.1, 0.2, 77.0
    yield logprobs, old_logprobs, advantages, torch.zeros_like(mask), 0.2, 0.2, None


_forward = leaf(
    "ppo_policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? mask, float clip_low,"
    " float clip_high, float? denominator) -> (Tensor, Tensor, Tensor)",
    ref=ppo_policy_loss_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=_cuda_forward if triton_kernel else None,
)
_op = op(
    _forward,
    reference=ppo_policy_loss_ref,
    samples=samples,
    grads=("logprobs",),
    setup_context=_setup_context,
    backward=_backward,
)


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_range: float | tuple[float, float] = 0.2,
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss, stats) of PPO's policy.

    loss = sum over the mask of max(-A ratio, -A clip(ratio, 1 - low, 1 + high)) / denominator,
    ratio = exp(logprobs - old_logprobs).

    logprobs: (...) float32|float64, of the response tokens under the policy; half precision becomes float32
    old_logprobs: like logprobs, under the policy that sampled them, at the same temperature
    advantages: like logprobs
    mask: (...) bool, True where a token counts; other tokens are not looked at and get gradient 0
    clip_range: one number, or (low, high)
    denominator: the number of tokens of the whole optimizer step, so that the losses and stats of micro-batches add up
        to those of the whole; without it the number of tokens that count here

    stats, detached: clip_fraction (clipped tokens), approx_kl (k3 estimate of KL(old || new)) and ratio are sums over
    the mask / denominator; ratio_max and ratio_min are extremes. With nothing to count loss and stats are 0.

    Only `logprobs` gets a gradient; the others must be detached. The log-ratio is not clamped: above 88.7 the ratio
    overflows float32, and with a negative advantage the loss is inf. NaN in, NaN out where the mask is True.
    Raises: ValueError for shapes, devices, clip_range or denominator, TypeError for dtypes.
    Source: Schulman et al., arXiv 1707.06347, equation 7.
    """
    logprobs, old_logprobs, advantages = widen(logprobs), widen(old_logprobs), widen(advantages)
    _check(logprobs, old_logprobs, advantages, mask)
    denominator_of("ppo_policy_loss", denominator)
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"ppo_policy_loss: clip_range must be 0 <= low <= 1 and high >= 0, got ({low}, {high})")
    loss, stats, _ = _op(logprobs, old_logprobs, advantages, mask, low, high, denominator)
    return loss, dict(zip(STATS, stats.unbind(), strict=True))
