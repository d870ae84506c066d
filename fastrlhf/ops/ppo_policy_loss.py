"""The clipped surrogate loss of PPO."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import address, contiguous, denominator_of, dtype_name, widen
from fastrlhf.ops._launch import triton
from fastrlhf.ops._loss import keep_gradients, named, scale_gradients
from fastrlhf.ops._registry import op
from fastrlhf.ops._surrogate import STATS, check, clip_bounds, fake, largest, surrogate
from fastrlhf.ops.approx_kl import exp_minus_linear
from fastrlhf.ops.ppo_sequence_loss import sequence_loss

triton_kernel = triton("ppo_policy_loss")


def ppo_policy_loss_ref(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    count = kept.sum().clamp(min=1).to(logprobs.dtype) if denominator is None else denominator
    log_ratio = torch.where(kept, logprobs - old_logprobs, 0)
    advantages = torch.where(kept, advantages, 0)
    ratio = log_ratio.exp()
    losses, slopes, held = surrogate(log_ratio, advantages, clip_low, clip_high, dual_clip)
    loss = losses.sum() / count
    with torch.no_grad():
        sums = (held.to(ratio.dtype), exp_minus_linear(log_ratio), torch.where(kept, ratio, 0))
        extremes = largest(ratio, kept), -largest(-ratio, kept)
        stats = torch.stack([*(x.sum() / count for x in sums), *extremes])
    return loss, stats, (slopes / count).contiguous()


def _cpu_forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, old_logprobs, advantages = logprobs.contiguous(), old_logprobs.contiguous(), advantages.contiguous()
    mask = None if mask is None else mask.contiguous()
    loss, stats, grad = fake(logprobs)
    getattr(_cpu, f"ppo_policy_loss_{dtype_name(logprobs)}")(
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
        torch.inf if dual_clip is None else dual_clip,
        denominator or 0.0,
        torch.get_num_threads(),
    )
    return loss, stats, grad


def _cuda_forward(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return triton_kernel.ppo_policy_loss(*contiguous(logprobs, old_logprobs, advantages, mask), *options)


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape in [(0,), (1,), (7, 3), (301,), (5000,)]:
        old_logprobs, step, advantages = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
        logprobs = old_logprobs + 0.3 * step
        yield logprobs, old_logprobs, advantages, None, 0.2, 0.2, None, None
        mask = (torch.rand(shape, generator=generator) < 0.6).to(device)
        yield logprobs, old_logprobs, advantages, mask, 0.2, 0.28, 1.4, None
        yield logprobs, old_logprobs, advantages, mask, 0.1, 0.2, None, 77.0
    yield logprobs, old_logprobs, advantages, torch.zeros_like(mask), 0.2, 0.2, None, None


_op = op(
    "ppo_policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? mask, float clip_low,"
    " float clip_high, float? dual_clip, float? denominator) -> (Tensor, Tensor, Tensor)",
    ref=ppo_policy_loss_ref,
    fake=fake,
    cpu=_cpu_forward,
    cuda=_cuda_forward if triton_kernel else None,
    check=check,
    samples=samples,
    grads=("logprobs",),
    setup_context=keep_gradients,
    backward=scale_gradients,
)


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_range: float | tuple[float, float] = 0.2,
    dual_clip: float | None = None,
    ratio: str = "token",
    cu_seqlens: Tensor | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss, stats) of PPO's policy.

    loss = sum over the mask of max(-A rho, -A clip(rho, 1 - low, 1 + high)) / denominator, with dual_clip at most
    -A dual_clip where A < 0. rho = exp(logprobs - old_logprobs), one a token.

    With ratio="sequence" rho_n = exp(mean over the mask in sequence n of logprobs - old_logprobs), every sum over
    tokens is first divided by the tokens that count in their sequence, and the denominator counts sequences: sequences
    weigh the same whatever their length. The gradient is that of the formula: one for all tokens of a sequence.

    logprobs: (...) float32|float64, of the response tokens under the policy; half precision becomes float32; (R,) with
        ratio="sequence"
    old_logprobs: like logprobs, under the policy that sampled them, at the same temperature
    advantages: like logprobs
    mask: (...) bool, True where a token counts; other tokens are not looked at and get gradient 0
    clip_range: one number, or (low, high)
    dual_clip: above 1; bounds the loss of a token that has a negative advantage and has become far likelier
    ratio: "token" or "sequence"
    cu_seqlens: (N + 1,) int32, the bounds of the sequences, for ratio="sequence"; a sequence may be empty
    denominator: the number of tokens (or sequences) of the whole optimizer step, so that the losses and stats of
        micro-batches add up to those of the whole; without it the number that count here

    stats, detached: clip_fraction (tokens that a bound holds, so that they get no gradient), approx_kl (k3 estimate of
    KL(old || new)) and ratio are sums over the mask / denominator; ratio_max and ratio_min are extremes. With nothing
    to count loss and stats are 0.

    Only `logprobs` gets a gradient; the others must be detached. The log-ratio is not clamped: above 88.7 the ratio
    overflows float32, and with a negative advantage the loss is inf without dual_clip; with advantage 0 loss and
    gradient are 0. NaN in, NaN out where the mask is True.
    Raises: ValueError for shapes, devices, options or cu_seqlens that do not fit, TypeError for dtypes.
    Source: Schulman et al., arXiv 1707.06347, equation 7; dual_clip: Ye et al., arXiv 1912.09729, equation 5; sequence
    ratio: Zheng et al., arXiv 2507.18071, equations 5 to 7.
    """
    logprobs, old_logprobs, advantages = widen(logprobs), widen(old_logprobs), widen(advantages)
    bounds = clip_bounds("ppo_policy_loss", clip_range, dual_clip)
    denominator_of("ppo_policy_loss", denominator)
    if ratio not in ("token", "sequence"):
        raise ValueError(f"ppo_policy_loss: ratio must be 'token' or 'sequence', got {ratio!r}")
    if (ratio == "sequence") != (cu_seqlens is not None):
        given = "without" if cu_seqlens is None else "with"
        raise ValueError(f"ppo_policy_loss: cu_seqlens belongs to ratio='sequence', got ratio={ratio!r} {given} it")
    if cu_seqlens is None:
        loss, stats, _ = _op(logprobs, old_logprobs, advantages, mask, *bounds, denominator)
    else:
        loss, stats, _ = sequence_loss(logprobs, old_logprobs, advantages, cu_seqlens, mask, bounds, denominator)
    return loss, named(STATS, stats)
