"""The clipped surrogate of PPO with one ratio a sequence: what `ppo_policy_loss(ratio="sequence")` calls."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import address, contiguous, cu_seqlens_of, dtype_name, has_shape, same_device
from fastrlhf.ops._launch import triton
from fastrlhf.ops._loss import keep_gradients, scale_gradients
from fastrlhf.ops._registry import op
from fastrlhf.ops._surrogate import check, fake, largest, surrogate
from fastrlhf.ops.approx_kl import exp_minus_linear

triton_kernel = triton("ppo_sequence_loss")


def ppo_sequence_loss_ref(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    lengths = cu_seqlens.diff().long()
    owner = torch.repeat_interleave(lengths, output_size=logprobs.shape[0])

    def total(x: Tensor) -> Tensor:
        return torch.segment_reduce(x, "sum", lengths=lengths, axis=0, unsafe=True)

    sizes = total(kept.to(logprobs.dtype))
    share = torch.where(kept, sizes.clamp(min=1).reciprocal()[owner], 0)
    count = (sizes > 0).sum().clamp(min=1).to(logprobs.dtype) if denominator is None else denominator
    log_ratio = torch.where(kept, logprobs - old_logprobs, 0)
    advantages = torch.where(kept, advantages, 0)
    means = torch.where(kept, total(share * log_ratio)[owner], 0)
    losses, slopes, held = surrogate(means, advantages, clip_low, clip_high, dual_clip)
    loss = (share * losses).sum() / count
    with torch.no_grad():
        ratio = means.exp()
        sums = (share * x for x in (held.to(ratio.dtype), exp_minus_linear(log_ratio), ratio))
        extremes = largest(ratio, kept), -largest(-ratio, kept)
        stats = torch.stack([*(x.sum() / count for x in sums), *extremes])
        grad = torch.where(kept, total(share * slopes)[owner] * share / count, 0)  # not 0 NaN outside the mask
    return loss, stats, grad.contiguous()


def _check(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor, mask: Tensor | None, *_: Any
) -> None:
    check(logprobs, old_logprobs, advantages, mask)
    same_device("ppo_policy_loss", logprobs=logprobs, cu_seqlens=cu_seqlens)
    has_shape("ppo_policy_loss", "logprobs", logprobs, (None,), "(R,)")
    cu_seqlens_of("ppo_policy_loss", "cu_seqlens", cu_seqlens, logprobs.shape[0])


def _cpu_forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, old_logprobs, advantages = logprobs.contiguous(), old_logprobs.contiguous(), advantages.contiguous()
    cu_seqlens, mask = cu_seqlens.contiguous(), None if mask is None else mask.contiguous()
    loss, stats, grad = fake(logprobs)
    getattr(_cpu, f"ppo_sequence_loss_{dtype_name(logprobs)}")(
        logprobs.data_ptr(),
        old_logprobs.data_ptr(),
        advantages.data_ptr(),
        cu_seqlens.data_ptr(),
        address(mask),
        loss.data_ptr(),
        stats.data_ptr(),
        grad.data_ptr(),
        cu_seqlens.shape[0] - 1,
        clip_low,
        clip_high,
        torch.inf if dual_clip is None else dual_clip,
        denominator or 0.0,
        torch.get_num_threads(),
    )
    return loss, stats, grad


def _cuda_forward(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return triton_kernel.ppo_sequence_loss(*contiguous(logprobs, old_logprobs, advantages, cu_seqlens, mask), *options)


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for lengths in [(), (0,), (1,), (3, 0, 1, 9), (64,) * 3, (4000, 2, 1041) * 2]:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        old, step, advantages = (torch.randn(sum(lengths), generator=generator).to(device, dtype) for _ in range(3))
        yield old + 0.5 * step, old, advantages, cu_seqlens, None, 0.01, 0.02, None, None
        mask = (torch.rand(sum(lengths), generator=generator) < 0.6).to(device)
        mask[: lengths[0] if lengths else 0] = False  # a sequence of which nothing counts
        yield old + 0.5 * step + 0.2, old, advantages, cu_seqlens, mask, 0.1, 0.1, 1.3, None
        yield old + 0.5 * step, old, advantages, cu_seqlens, mask, 0.01, 0.02, None, 77.0
    yield old + step, old, advantages, cu_seqlens, torch.zeros_like(mask), 0.2, 0.2, None, None


_op = op(
    "ppo_sequence_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor cu_seqlens, Tensor? mask,"
    " float clip_low, float clip_high, float? dual_clip, float? denominator) -> (Tensor, Tensor, Tensor)",
    ref=ppo_sequence_loss_ref,
    fake=fake,
    cpu=_cpu_forward,
    cuda=_cuda_forward if triton_kernel else None,
    check=_check,
    samples=samples,
    grads=("logprobs",),
    setup_context=keep_gradients,
    backward=scale_gradients,
)


def sequence_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bounds: tuple[float, float, float | None],
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, stats, gradient) for checked bounds (clip_low, clip_high, dual_clip)."""
    return _op(logprobs, old_logprobs, advantages, cu_seqlens, mask, *bounds, denominator)
