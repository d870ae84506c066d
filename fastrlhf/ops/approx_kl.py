"""Estimators of the KL divergence from the log-probs of sampled tokens."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import WIDE, alike, dense, dtype_name, widen
from fastrlhf.ops._launch import triton
from fastrlhf.ops._registry import op

triton_kernel = triton("approx_kl")
ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}


def exp_minus_linear(r: Tensor) -> Tensor:
    """Returns e^r - 1 - r. Below 1 even expm1(r) - r cancels, so there it is the Taylor series (float64 needs 19)."""
    series = torch.ones_like(r)
    for n in range(19, 2, -1):
        series = 1 + r / n * series
    return torch.where(r.abs() < 1, r * r / 2 * series, r.expm1() - r)


def approx_kl_ref(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    r = ref_logprobs - logprobs
    if estimator == 1:
        return -r
    return r * r / 2 if estimator == 2 else exp_minus_linear(r)


def kl_slope(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    """The derivative of the estimate in logprobs; that in ref_logprobs is its negative."""
    if estimator == 1:
        return torch.ones_like(logprobs)
    return logprobs - ref_logprobs if estimator == 2 else -(ref_logprobs - logprobs).expm1()


def _check(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> None:
    alike("approx_kl", WIDE, {"logprobs": logprobs, "ref_logprobs": ref_logprobs})


def _fits(logprobs: Tensor, ref_logprobs: Tensor) -> bool:
    """Whether the check would pass, found out fast: most of the time of k1 of a few tokens."""
    dtype = logprobs.dtype
    return (
        dtype in WIDE
        and dtype is ref_logprobs.dtype
        and logprobs.shape == ref_logprobs.shape
        and logprobs.is_cpu
        and ref_logprobs.is_cpu
        and logprobs.layout is ref_logprobs.layout is torch.strided
    )


def _fake(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    return torch.empty_like(logprobs, memory_format=torch.contiguous_format)


def _cpu_forward(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    logprobs, ref_logprobs = logprobs.contiguous(), ref_logprobs.contiguous()
    out = torch.empty_like(logprobs)
    kernel = getattr(_cpu, f"approx_kl_{dtype_name(logprobs)}")
    num, threads = out.numel(), torch.get_num_threads()
    kernel(logprobs.data_ptr(), ref_logprobs.data_ptr(), out.data_ptr(), num, estimator, threads)
    return out


def _cuda_forward(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    return triton_kernel.approx_kl(logprobs.contiguous(), ref_logprobs.contiguous(), estimator)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logprobs, ref_logprobs, ctx.estimator = inputs
    ctx.save_for_backward(logprobs, ref_logprobs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    logprobs, ref_logprobs = ctx.saved_tensors
    if ctx.estimator == 1:
        return grad, -grad, None
    slope = ref_logprobs - logprobs  # of the estimate in ref_logprobs
    if ctx.estimator == 3:
        slope.expm1_()
    of_ref = grad * slope if ctx.needs_input_grad[1] else None
    return -of_ref if of_ref is not None else grad * slope.neg_(), of_ref, None


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape, spread in [((0,), 1.0), ((1,), 1.0), ((7, 3), 0.1), ((301,), 2.0), ((5000,), 0.01)]:
        logprobs = -3 + torch.randn(shape, generator=generator, dtype=torch.float64)
        ref_logprobs = logprobs + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        for estimator in ESTIMATORS.values():
            yield logprobs.to(device, dtype), ref_logprobs.to(device, dtype), estimator


_op = op(
    "approx_kl(Tensor logprobs, Tensor ref_logprobs, int estimator) -> Tensor",
    ref=approx_kl_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=_cuda_forward if triton_kernel else None,
    check=_check,
    samples=samples,
    grads=("logprobs", "ref_logprobs"),
    setup_context=_setup_context,
    backward=_backward,
)


def approx_kl(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """Returns an estimate of KL(policy || reference) at each token that the policy sampled.

    With r = ref_logprobs - logprobs:  k1 = -r,  k2 = r^2 / 2,  k3 = e^r - 1 - r.

    k1 and k3 are unbiased, k3 is never negative, k2 is biased but close. In a reward use k1: its sum over a response
    is the log-ratio of the response itself. In a loss use k2: its gradient is that of KL(policy || reference), whereas
    the gradient of k1 has mean zero and that of k3 pulls towards KL(reference || policy).

    logprobs: (...) float32|float64, log-probs of the sampled tokens under the policy; half precision becomes float32
    ref_logprobs: like logprobs, of the same tokens under the reference
    estimator: "k1", "k2" or "k3"

    Both arguments get a gradient. Nothing is clamped: k3 overflows to inf where r > 88.7 in float32. NaN in, NaN out.
    Raises: ValueError for shapes or devices that differ and for other estimators, TypeError for dtypes.
    Source: Schulman, "Approximating KL divergence" (2020).
    """
    if estimator == "k1" and _fits(logprobs, ref_logprobs):
        return logprobs - ref_logprobs
    logprobs, ref_logprobs = widen(logprobs), widen(ref_logprobs)
    if estimator not in ESTIMATORS:
        raise ValueError(f"approx_kl: estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if estimator == "k1":  # which torch cannot be beaten at
        _check(logprobs, ref_logprobs, 1)
        dense("approx_kl", logprobs=logprobs, ref_logprobs=ref_logprobs)
        return logprobs - ref_logprobs
    return _op(logprobs, ref_logprobs, ESTIMATORS[estimator])
