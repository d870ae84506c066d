"""Log-probabilities and entropies of the rows of given logits."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import (
    FLOATS,
    address,
    computed_in,
    dtype_in,
    dtype_name,
    has_shape,
    indices_below,
    one_or_all,
    same_device,
    temperature_of,
)
from fastrlhf.ops._launch import triton
from fastrlhf.ops._registry import leaf, once, op

triton_kernel = triton("token_logprobs")
LOWEST = -1e4  # stands for log 0, so that 0 log 0 is 0


def token_logprobs_ref(logits: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    wide = logits.to(computed_in(logits))
    table = (wide / temperature[:, None]).log_softmax(-1)
    size = logits.shape[1]
    logprobs = table.gather(1, targets.clamp(0, size - 1)[:, None])[:, 0]
    logprobs = logprobs.masked_fill((targets < 0) | (targets >= size), torch.nan)
    entropy = -(table.exp() * table.clamp_min(LOWEST)).sum(-1)
    return logprobs, entropy, wide.detach().amax(-1), -table.detach().amax(-1)


def token_logprobs_backward_ref(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    highest: Tensor,
    log_sum: Tensor,
) -> Tensor:
    scale = 1 / temperature[:, None]
    # highest and log_sum rather than their sum, so that no digits are lost to large logits
    table = (logits.to(entropy.dtype) - highest[:, None]) * scale - log_sum[:, None]
    probs = table.exp()
    grads, skipped = torch.zeros_like(table), torch.ones_like(targets, dtype=torch.bool)
    inside = (targets >= 0) & (targets < logits.shape[1])
    if grad_logprobs is not None:
        index = targets.clamp(0, logits.shape[1] - 1)[:, None]
        grads = -probs.scatter(1, index, table.gather(1, index).expm1()) * grad_logprobs[:, None]
        skipped &= grad_logprobs == 0
    if grad_entropy is not None:
        log_probs = table.clamp_min(LOWEST)
        grads = grads - probs * (log_probs + entropy[:, None]) * grad_entropy[:, None]
        skipped &= grad_entropy == 0
    grads = (grads * scale).masked_fill(~inside[:, None], torch.nan).masked_fill((skipped & inside)[:, None], 0.0)
    return grads.to(logits.dtype)


def _backward_in_place_ref(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *saved: Tensor
) -> None:
    logits.copy_(token_logprobs_backward_ref(grad_logprobs, grad_entropy, logits, *saved))


def _check(logits: Tensor, targets: Tensor, temperature: Tensor) -> None:
    name = "token_logprobs"
    same_device(name, logits=logits, targets=targets, temperature=temperature)
    dtype_in(name, "logits", logits, FLOATS)
    has_shape(name, "logits", logits, (None, None), "(T, V)")
    if logits.shape[1] == 0:
        raise ValueError(f"{name}: logits must have at least one column, got {tuple(logits.shape)}")
    dtype_in(name, "targets", targets, (torch.int64,))
    has_shape(name, "targets", targets, (logits.shape[0],), "(T,)")
    dtype_in(name, "temperature", temperature, (computed_in(logits),))
    one_or_all(name, temperature, logits.shape[0])


def rows_of(logits: Tensor) -> Tensor:
    """The logits with the elements of a row side by side: the same memory where they are already."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """New tensors for logprobs, entropy, highest (the largest logit) and log_sum, each (T,)."""
    return tuple(logits.new_empty(logits.shape[0], dtype=computed_in(logits)) for _ in range(4))


def _cpu_forward(logits: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    _check(logits, targets, temperature)
    logits, targets, temperature = rows_of(logits), targets.contiguous(), temperature.contiguous()
    outputs = _fake(logits)
    getattr(_cpu, f"token_logprobs_{dtype_name(logits)}")(
        *map(address, (logits, targets, temperature, *outputs)),
        *logits.shape,
        logits.stride(0),
        int(temperature.shape[0] > 1),
        torch.get_num_threads(),
    )
    return outputs


def _cuda_forward(logits: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    _check(logits, targets, temperature)
    return triton_kernel.token_logprobs(rows_of(logits), targets.contiguous(), temperature.contiguous())


def _cpu_gradient(upstream: list[Tensor | None], logits: Tensor, saved: list[Tensor], out: Tensor) -> None:
    getattr(_cpu, f"token_logprobs_backward_{dtype_name(logits)}")(
        *map(address, (*upstream, logits, *saved, out)),
        *logits.shape,
        logits.stride(0),
        out.stride(0),
        int(saved[1].shape[0] > 1),
        torch.get_num_threads(),
    )


def _checked(g: Tensor | None, h: Tensor | None, logits: Tensor, *saved: Tensor) -> tuple[Any, ...]:
    """The upstream gradients, the logits and what forward saved, as the kernels take them."""
    targets, temperature, *statistics = (t.contiguous() for t in saved)
    _check(logits, targets, temperature)
    upstream = [None if grad is None else grad.contiguous() for grad in (g, h)]
    for tensor in (*upstream, *statistics):
        if tensor is not None:
            same_device("token_logprobs", logits=logits, statistics=tensor)
            dtype_in("token_logprobs", "gradients and statistics", tensor, (computed_in(logits),))
            has_shape("token_logprobs", "gradients and statistics", tensor, (logits.shape[0],), "(T,)")
    return upstream, rows_of(logits), [targets, temperature, *statistics]


def _gradients_by(launch: Callable[..., None]) -> tuple[Callable[..., Tensor], Callable[..., None]]:
    """The two forms of the gradient: `launch` writes it to a new tensor, and over the logits."""

    def backward(grad_logprobs: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *saved: Tensor) -> Tensor:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        launch(*_checked(grad_logprobs, grad_entropy, logits, *saved), out)
        return out

    def in_place(grad_logprobs: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *saved: Tensor) -> None:
        _check_in_place(logits)
        launch(*_checked(grad_logprobs, grad_entropy, logits, *saved), logits)

    return backward, in_place


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_logprobs is None and grad_entropy is None:
        return None, None, None
    return _gradient(grad_logprobs, grad_entropy, *ctx.saved_tensors), None, None


class _InPlace(torch.autograd.Function):
    """The op with its gradient written over the logits. Saved tensors are version-checked: a second backward raises."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        output = _op.forward(logits, targets, temperature)
        _setup_context(ctx, (logits, targets, temperature), output)
        return output

    @staticmethod
    @functools.partial(once, "token_logprobs")
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None
        logits, *saved = ctx.saved_tensors
        logits = logits.detach()
        _gradient_in_place(grad_logprobs, grad_entropy, logits, *saved)
        torch.autograd.graph.increment_version(logits)
        return logits, None, None


def _check_in_place(logits: Tensor) -> None:
    """Raises unless a gradient may be written over these logits."""
    if torch.compiler.is_compiling():
        raise ValueError("token_logprobs: inplace_backward is not supported under torch.compile")
    base = logits if logits._base is None else logits._base
    if base.requires_grad and base.is_leaf:
        raise ValueError(
            "token_logprobs: inplace_backward would overwrite a parameter: logits is a leaf, or a view of one"
        )
    (rows, size), (step, inner) = logits.shape, logits.stride()
    if (rows > 1 and step < size) or (size > 1 and inner != 1):
        expected = f"rows of consecutive elements that do not overlap, got strides {logits.stride()}"
        raise ValueError(f"token_logprobs: inplace_backward expects logits with {expected}")


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    for num_rows, size in [(0, 3), (1, 1), (4, 5), (3, 2048), (5, 5003)]:
        logits = 3 * torch.randn(num_rows, size, generator=generator) + 100 * torch.arange(num_rows)[:, None]
        targets = torch.randint(size, (num_rows,), generator=generator).to(device)
        yield logits.to(device, dtype), targets, torch.ones(1, device=device, dtype=wide)
        temperature = torch.linspace(0.5, 2.0, num_rows).to(device, wide)
        if size > 100:  # one token certain, the rest impossible; out of reach of gradcheck's finite differences
            logits[1:2, 1:] = -torch.inf
        yield logits.to(device, dtype), targets, temperature


_SAVED = "Tensor targets, Tensor temperature, Tensor entropy, Tensor highest, Tensor log_sum"
_cpu_backward, _cpu_in_place = _gradients_by(_cpu_gradient)
_cuda_backward, _cuda_in_place = _gradients_by(lambda *args: triton_kernel.token_logprobs_backward(*args))
_gradient = leaf(
    f"token_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, {_SAVED}) -> Tensor",
    ref=token_logprobs_backward_ref,
    fake=lambda g, h, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    cpu=_cpu_backward,
    cuda=_cuda_backward if triton_kernel else None,
)
_gradient_in_place = leaf(
    f"token_logprobs_backward_(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor(a!) logits, {_SAVED}) -> ()",
    ref=_backward_in_place_ref,
    fake=lambda *_: None,
    cpu=_cpu_in_place,
    cuda=_cuda_in_place if triton_kernel else None,
)
_op = op(
    "token_logprobs(Tensor logits, Tensor targets, Tensor temperature) -> (Tensor, Tensor, Tensor, Tensor)",
    ref=token_logprobs_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=_cuda_forward if triton_kernel else None,
    samples=samples,
    grads=("logits",),
    setup_context=_setup_context,
    backward=_backward,
)


def logsumexp_of(temperature: Tensor, highest: Tensor, log_sum: Tensor) -> Tensor:
    """The log-sum-exp of rows of logits / temperature, from the statistics that the kernels return."""
    return highest / temperature + log_sum


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    return_logsumexp: bool = False,
    inplace_backward: bool = False,
) -> Any:
    """Returns the log-probability of each row's target and, if requested, its entropy and log-sum-exp.

    logprobs[t] = log softmax(logits[t] / temperature)[targets[t]];  entropy[t] = -sum_v p[t, v] log p[t, v];
    logsumexp[t] = log sum_v exp(logits[t, v] / temperature)

    logits: (T, V) float32|float64|bfloat16|float16; rows may be strided; -inf is a token of probability 0
    targets: (T,) int64 in [0, V); elsewhere than on the CPU a target out of range gives NaN for its row
    temperature: a number or (T,), above 0; gets no gradient
    logprobs, entropy, logsumexp: (T,) float32 whatever the logits (float64 for float64), computed in it in one read of
        the logits; in this order; entropy and logsumexp only if requested
    inplace_backward: writes the gradient over the logits, which saves a (T, V) tensor; they are garbage after backward,
        which can then run only once. Not under torch.compile, nor for logits that are a leaf

    logprobs and entropy have a gradient, logsumexp is detached; a second derivative raises. Rows with an upstream
    gradient of 0 get exactly 0. NaN in, NaN out, for the row. Sums run in a fixed order: the result does not depend on
    the number of threads.
    Raises: ValueError for shapes, devices, targets or temperatures that do not fit, TypeError for dtypes.
    """
    scale = temperature_of("token_logprobs", temperature, logits)
    _check(logits, targets, scale)
    indices_below("token_logprobs", "targets", targets, logits.shape[1])
    if inplace_backward and torch.is_grad_enabled() and logits.requires_grad:
        _check_in_place(logits)
        logprobs, entropy, *rest = _InPlace.apply(logits, targets, scale)
    else:
        logprobs, entropy, *rest = _op(logits, targets, scale)
    more = [entropy] if return_entropy else []
    if return_logsumexp:
        more.append(logsumexp_of(scale, *rest))
    return (logprobs, *more) if more else logprobs
