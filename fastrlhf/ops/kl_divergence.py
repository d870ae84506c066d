"""Divergence of two distributions over the whole vocabulary, given as logits."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import FLOATS, address, computed_in, dtype_in, dtype_name, has_shape, same_device, same_shape
from fastrlhf.ops._launch import triton
from fastrlhf.ops._registry import leaf, op
from fastrlhf.ops.token_logprobs import rows_of

triton_kernel = triton("kl_divergence")
KINDS = ("forward", "reverse", "js")


def _log_ratios(log_p: Tensor, log_q: Tensor, jensen_shannon: bool) -> tuple[Tensor, Tensor]:
    """log(p / other) and log(q / other), the other being m = (p + q) / 2, or without jensen_shannon q for p."""
    if not jensen_shannon:
        return log_p - log_q, torch.zeros_like(log_q)
    impossible = log_p.isneginf() & log_q.isneginf()  # where log m has no gradient
    log_p, log_q = log_p.masked_fill(impossible, 0.0), log_q.masked_fill(impossible, 0.0)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return log_p - log_m, log_q - log_m


def _weighted(weights: Tensor, ratios: Tensor) -> Tensor:
    """weights * ratios, 0 where the weight is 0 whatever the ratio."""
    return weights * ratios.masked_fill(weights == 0, 0.0)


def kl_divergence_ref(
    logits_p: Tensor, logits_q: Tensor, temperature: float, jensen_shannon: bool
) -> tuple[Tensor, Tensor]:
    wide_p, wide_q = (logits.to(computed_in(logits)) for logits in (logits_p, logits_q))
    log_p, log_q = (wide_p / temperature).log_softmax(-1), (wide_q / temperature).log_softmax(-1)
    ratios = _log_ratios(log_p, log_q, jensen_shannon)
    of_p, of_q = (_weighted(log.exp(), ratio).sum(-1) for log, ratio in zip((log_p, log_q), ratios, strict=True))
    divergence = (of_p + of_q) / 2 if jensen_shannon else of_p
    sums = [t.detach() for x, log in ((wide_p, log_p), (wide_q, log_q)) for t in (x.amax(-1), -log.amax(-1))]
    return divergence.clamp_min(0), torch.stack([*sums, of_p.detach(), of_q.detach()], -1)


def kl_divergence_backward_ref(
    grad: Tensor,
    logits_p: Tensor,
    logits_q: Tensor,
    statistics: Tensor,
    temperature: float,
    jensen_shannon: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    highest_p, log_sum_p, highest_q, log_sum_q, of_p, of_q = statistics[..., None].unbind(1)
    log_p = (logits_p.to(statistics.dtype) - highest_p) / temperature - log_sum_p
    log_q = (logits_q.to(statistics.dtype) - highest_q) / temperature - log_sum_q
    p, q, upstream = log_p.exp(), log_q.exp(), grad[:, None] / temperature
    ratio_p, ratio_q = _log_ratios(log_p, log_q, jensen_shannon)
    if jensen_shannon:
        grads = upstream / 2 * _weighted(p, ratio_p - of_p), upstream / 2 * _weighted(q, ratio_q - of_q)
    else:
        grads = upstream * _weighted(p, ratio_p - of_p), upstream * (q - p)
    outputs = [g.masked_fill(grad[:, None] == 0, 0.0).to(logits_p.dtype) for g in grads]
    return _only(outputs, wanted)


def _only(grads: list[Tensor], wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """The gradients that are wanted; empty for the others."""
    first, second = (g if want else g.new_empty(0) for g, want in zip(grads, wanted, strict=True))
    return first, second


def _check(logits_p: Tensor, logits_q: Tensor) -> None:
    name = "kl_divergence"
    same_device(name, logits_p=logits_p, logits_q=logits_q)
    dtype_in(name, "logits_p", logits_p, FLOATS)
    dtype_in(name, "logits_q", logits_q, (logits_p.dtype,))
    has_shape(name, "logits_p", logits_p, (None, None), "(T, V)")
    same_shape(name, logits_p=logits_p, logits_q=logits_q)
    if logits_p.shape[1] == 0:
        raise ValueError(f"{name}: logits_p must have at least one column, got {tuple(logits_p.shape)}")


def _fake(logits_p: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    num_rows, wide = logits_p.shape[0], computed_in(logits_p)
    return logits_p.new_empty(num_rows, dtype=wide), logits_p.new_empty(num_rows, 6, dtype=wide)


def _fake_backward(grad: Tensor, logits_p: Tensor, logits_q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (logits_p, logits_q)]
    return _only(grads, args[-1])


def _launch_cpu(logits_p: Tensor, logits_q: Tensor, outputs: tuple[Tensor, Tensor], *options: Any) -> None:
    getattr(_cpu, f"kl_divergence_{dtype_name(logits_p)}")(
        *map(address, (logits_p, logits_q, *outputs)),
        *logits_p.shape,
        logits_p.stride(0),
        logits_q.stride(0),
        *options,
        torch.get_num_threads(),
    )


def _launch_cpu_backward(
    grad: Tensor, logits_p: Tensor, logits_q: Tensor, statistics: Tensor, grads: list[Tensor | None], *options: Any
) -> None:
    getattr(_cpu, f"kl_divergence_backward_{dtype_name(logits_p)}")(
        *map(address, (grad, logits_p, logits_q, statistics, *grads)),
        *logits_p.shape,
        logits_p.stride(0),
        logits_q.stride(0),
        *(0 if g is None else g.stride(0) for g in grads),
        *options,
        torch.get_num_threads(),
    )


def _forward_by(launch: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(logits_p: Tensor, logits_q: Tensor, temperature: float, jensen_shannon: bool) -> tuple[Tensor, Tensor]:
        _check(logits_p, logits_q)
        outputs = _fake(logits_p)
        launch(rows_of(logits_p), rows_of(logits_q), outputs, temperature, jensen_shannon)
        return outputs

    return forward


def _gradients_by(launch: Callable[..., None]) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., None]]:
    """The two forms of the gradient: `launch` writes it to new tensors, and over the logits."""

    def write(
        grads: tuple[Tensor, Tensor],
        grad: Tensor,
        logits_p: Tensor,
        logits_q: Tensor,
        statistics: Tensor,
        temperature: float,
        jensen_shannon: bool,
        wanted: list[bool],
    ) -> None:
        _check(logits_p, logits_q)
        for name, tensor, shape in (("gradient", grad, ()), ("statistics", statistics, (6,))):
            same_device("kl_divergence", logits_p=logits_p, **{name: tensor})
            dtype_in("kl_divergence", name, tensor, (computed_in(logits_p),))
            has_shape("kl_divergence", name, tensor, (logits_p.shape[0], *shape), "(T, ...)")
        chosen = [g if want else None for g, want in zip(grads, wanted, strict=True)]
        tensors = grad.contiguous(), rows_of(logits_p), rows_of(logits_q), statistics.contiguous()
        if any(wanted):
            launch(*tensors, chosen, temperature, jensen_shannon)

    def backward(*args: Any) -> tuple[Tensor, Tensor]:
        grads = _fake_backward(*args)
        write(grads, *args)
        return grads

    def in_place(grad: Tensor, logits_p: Tensor, logits_q: Tensor, *rest: Any) -> None:
        if not (logits_p.is_contiguous() and logits_q.is_contiguous()):
            raise ValueError("kl_divergence: a gradient in place expects contiguous logits")
        write((logits_p, logits_q), grad, logits_p, logits_q, *rest)

    return backward, in_place


def _backward_in_place_ref(grad: Tensor, logits_p: Tensor, logits_q: Tensor, *rest: Any) -> None:
    grads = kl_divergence_backward_ref(grad, logits_p, logits_q, *rest)
    for logits, written, want in zip((logits_p, logits_q), grads, rest[-1], strict=True):
        if want:
            logits.copy_(written)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.options = inputs[2:]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 4
    wanted = list(ctx.needs_input_grad[:2])
    grads = _gradient(grad, *ctx.saved_tensors, *ctx.options, wanted)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None, None


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for num_rows, size in [(0, 3), (1, 1), (4, 5), (3, 2048), (5, 5003)]:
        first, second = 2 * torch.randn(2, num_rows, size, generator=generator)
        second += 0.5 * first + 50 * torch.arange(num_rows)[:, None]
        if size > 100:
            first[1:, ::3] = second[2:, ::3] = -torch.inf  # impossible for one, for both
            first[0] = second[0]
        for temperature, jensen_shannon in ((1.0, False), (1.0, True), (0.7, False), (1.5, True)):
            yield first.to(device, dtype), second.to(device, dtype), temperature, jensen_shannon


_OPTIONS = "float temperature, bool jensen_shannon"
_SAVED = f"Tensor statistics, {_OPTIONS}, bool[] wanted"
_cpu_backward, _cpu_in_place = _gradients_by(_launch_cpu_backward)
_cuda_backward, _cuda_in_place = _gradients_by(lambda *args: triton_kernel.kl_divergence_backward(*args))
_gradient = leaf(
    f"kl_divergence_backward(Tensor grad, Tensor logits_p, Tensor logits_q, {_SAVED}) -> (Tensor, Tensor)",
    ref=kl_divergence_backward_ref,
    fake=_fake_backward,
    cpu=_cpu_backward,
    cuda=_cuda_backward if triton_kernel else None,
)
_gradient_in_place = leaf(
    f"kl_divergence_backward_(Tensor grad, Tensor(a!) logits_p, Tensor(b!) logits_q, {_SAVED}) -> ()",
    ref=_backward_in_place_ref,
    fake=lambda *_: None,
    cpu=_cpu_in_place,
    cuda=_cuda_in_place if triton_kernel else None,
)
_op = op(
    f"kl_divergence(Tensor logits_p, Tensor logits_q, {_OPTIONS}) -> (Tensor, Tensor)",
    ref=kl_divergence_ref,
    fake=_fake,
    cpu=_forward_by(_launch_cpu),
    cuda=_forward_by(lambda *args: triton_kernel.kl_divergence(*args)) if triton_kernel else None,
    samples=samples,
    grads=("logits_p", "logits_q"),
    setup_context=_setup_context,
    backward=_backward,
)


def check_divergence(function: str, kind: str, temperature: float) -> None:
    """Raises unless the options of a divergence are in range."""
    if kind not in KINDS:
        raise ValueError(f"{function}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{function}: temperature must be above 0 and finite, got {temperature}")


def kl_divergence(logits_p: Tensor, logits_q: Tensor, *, kind: str = "forward", temperature: float = 1.0) -> Tensor:
    """Returns the divergence of each row's two distributions, over the whole vocabulary: exact, where `approx_kl`
    estimates it from one token.

    With p = softmax(logits_p / temperature), q = softmax(logits_q / temperature) and m = (p + q) / 2:
        forward: KL(p || q) = sum_v p (log p - log q);  reverse: KL(q || p);  js: (KL(p || m) + KL(q || m)) / 2

    logits_p, logits_q: (T, V) float32|float64|bfloat16|float16, of one dtype; rows may be strided; -inf is a token of
        probability 0
    kind: forward, reverse or js (Jensen-Shannon, at most log 2)
    temperature: above 0
    divergence: (T,) float32 whatever the logits (float64 for float64), at least 0; exactly 0 for equal rows; infinite
        where a token that is possible for the first is impossible for the second, which js never is

    Gradients for both sides, as far as they need one; a second derivative raises. Rows with an upstream gradient of 0
    get exactly 0. NaN in, NaN out, for the row. One read of the logits (js: a second from the cache), sums in a fixed
    order: the result does not depend on the number of threads.
    Raises: ValueError for shapes, devices, a kind or a temperature that do not fit, TypeError for dtypes.
    Source: Kullback and Leibler 1951, https://doi.org/10.1214/aoms/1177729694; Lin 1991,
    https://doi.org/10.1109/18.61115 (Jensen-Shannon).
    """
    check_divergence("kl_divergence", kind, temperature)
    _check(logits_p, logits_q)
    first, second = (logits_q, logits_p) if kind == "reverse" else (logits_p, logits_q)
    divergence, _ = _op(first, second, temperature, kind == "js")
    return divergence
