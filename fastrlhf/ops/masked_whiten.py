"""Normalisation to mean 0 and variance 1 over a mask."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import WIDE, address, alike, contiguous, dtype_in, dtype_name, has_shape, same_device, widen
from fastrlhf.ops._launch import if_built, launch
from fastrlhf.ops._registry import op

NUM_PARTS = 512  # rows of the CUDA kernels' workspace


def masked_moments_ref(x: Tensor, mask: Tensor | None) -> Tensor:
    kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    n = kept.sum(dtype=torch.float64)
    mean = torch.where(kept, x, 0).sum(dtype=torch.float64) / n.clamp(min=1)
    return torch.stack([n, mean, torch.where(kept, x - mean, 0).double().square().sum()])


def masked_whiten_ref(x: Tensor, mask: Tensor | None, moments: Tensor | None, center: bool, eps: float) -> Tensor:
    n, mean, squares = (masked_moments_ref(x, mask) if moments is None else moments).unbind()
    white = (x - mean) * (squares / n.clamp(min=1) + eps).rsqrt()
    white = (white if center else white + mean).to(x.dtype).contiguous()
    return white if mask is None else torch.where(mask, white, 0)


def _check(x: Tensor, mask: Tensor | None, moments: Tensor | None = None, *_: Any) -> None:
    alike("masked_whiten", WIDE, {"x": x}, mask)
    if moments is not None:
        same_device("masked_whiten", x=x, moments=moments)
        dtype_in("masked_whiten", "moments", moments, (torch.float64,))
        has_shape("masked_whiten", "moments", moments, (3,), "(3,)")


def _fake_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.new_empty(3, dtype=torch.float64)


def _cpu_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    x, mask = contiguous(x, mask)
    moments = _fake_moments(x, mask)
    kernel = getattr(_cpu, f"masked_moments_{dtype_name(x)}")
    kernel(x.data_ptr(), address(mask), moments.data_ptr(), x.numel(), torch.get_num_threads())
    return moments


def _cuda_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    x, mask = contiguous(x, mask)
    moments, parts = _fake_moments(x, mask), x.new_empty(NUM_PARTS, 3, dtype=torch.float64)
    kernel = f"masked_moments_{dtype_name(x)}"
    launch(kernel, x, x.data_ptr(), address(mask), parts.data_ptr(), moments.data_ptr(), x.numel())
    return moments


def _fake_whiten(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _cpu_whiten(x: Tensor, mask: Tensor | None, moments: Tensor | None, center: bool, eps: float) -> Tensor:
    x, mask, moments = contiguous(x, mask, moments)
    out = torch.empty_like(x)
    kernel = getattr(_cpu, f"masked_whiten_{dtype_name(x)}")
    num, threads = x.numel(), torch.get_num_threads()
    kernel(x.data_ptr(), address(mask), address(moments), out.data_ptr(), num, center, eps, threads)
    return out


def _cuda_whiten(x: Tensor, mask: Tensor | None, moments: Tensor | None, center: bool, eps: float) -> Tensor:
    x, mask, moments = contiguous(x, mask, moments)
    out, parts = torch.empty_like(x), x.new_empty(NUM_PARTS, 3, dtype=torch.float64)
    addresses = map(address, (x, mask, moments, parts, out))
    launch(f"masked_whiten_{dtype_name(x)}", x, *addresses, x.numel(), center, eps)
    return out


def samples_moments(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape in [(0,), (1,), (13, 3), (5000,)]:
        x = (3 + torch.randn(shape, generator=generator)).to(device, dtype)
        yield x, None
        yield x, (torch.rand(shape, generator=generator) < 0.6).to(device)
    yield x, torch.zeros_like(x, dtype=torch.bool)


def samples_whiten(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for i, (x, mask) in enumerate(samples_moments(device, dtype)):
        yield x, mask, masked_moments_ref(x.double(), mask), i % 3 > 0, 1e-8
        yield x, mask, None, i % 3 > 0, 1e-8


_moments = op(
    "masked_moments(Tensor x, Tensor? mask) -> Tensor",
    ref=masked_moments_ref,
    fake=_fake_moments,
    check=_check,
    cpu=_cpu_moments,
    cuda=if_built(_cuda_moments),
    samples=samples_moments,
)
_whiten = op(
    "masked_whiten(Tensor x, Tensor? mask, Tensor? moments, bool center, float eps) -> Tensor",
    ref=masked_whiten_ref,
    fake=_fake_whiten,
    check=_check,
    cpu=_cpu_whiten,
    cuda=if_built(_cuda_whiten),
    samples=samples_whiten,
)


def _over_group(moments: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The moments of the union of what the processes of the group hold."""
    n, mean, squares = moments.unbind()
    sums = torch.stack([n, n * mean, squares + n * mean * mean])
    dist.all_reduce(sums, group=group)
    n, total, squares = sums.unbind()
    mean = total / n.clamp(min=1)
    return torch.stack([n, mean, (squares - n * mean * mean).clamp(min=0)])


def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    center: bool = True,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Returns `x` scaled to variance 1 and moved to mean 0 over the mask.

    y = (x - mean) / sqrt(variance + eps), plus the mean with center=False; the variance is the biased one.

    x: (...) float32|float64; half precision becomes float32
    mask: (...) bool, True where an element counts; the result is exactly 0 elsewhere
    center: False adds the mean back (for rewards, whose sign matters)
    eps: added to the variance, so that equal elements give 0
    group: mean and variance over all processes of this group, by one all-reduce of (n, sum, sum of squares) in float64

    The result is not differentiable, and the same for every number of threads. NaN in, NaN out where the mask is True;
    what lies outside the mask is not looked at. Without an element inside the mask the result is 0.
    Raises: ValueError for shapes or devices that differ and for a negative eps, TypeError for dtypes.
    Source: Ziegler et al., arXiv 1909.08593 (`whiten` in its code).
    """
    x = widen(x)
    if not eps >= 0:
        raise ValueError(f"masked_whiten: eps must not be negative, got {eps}")
    moments = None if group is None else _over_group(_moments(x, mask), group)
    return _whiten(x, mask, moments, center, eps)
