"""Log-probabilities and entropies under a linear head, from hidden states: the (T, V) logits never exist at once."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops._check import dtype_in, has_shape, indices_below, same_device
from fastrlhf.ops._registry import leaf, op
from fastrlhf.ops.token_logprobs import FLOATS, computed_in, one_or_all, temperature_of, token_logprobs_ref

WEIGHT_ROWS = 4096  # half-precision weights are widened this many rows at a time


class _Head(NamedTuple):
    """logits = cap tanh(scale x / cap) with x = hidden weight^T + bias; scale x without a cap."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    cap: float | None

    def temperatures(self, temperature: Tensor, num_rows: int) -> Tensor:
        """(T,) what the rows of `chunks` are to be divided by: without a cap the scale is applied here, at no cost."""
        return (temperature / self.scale if self.cap is None else temperature).expand(num_rows)

    def weight_blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The rows of the weight in `dtype`: all at once, or widened block by block in a buffer that is reused."""
        if self.weight.dtype == dtype:
            yield slice(None), self.weight
            return
        size, width = self.weight.shape
        buffer = self.weight.new_empty((min(WEIGHT_ROWS, size), width), dtype=dtype)
        for start in range(0, size, WEIGHT_ROWS):
            rows = slice(start, min(start + WEIGHT_ROWS, size))
            yield rows, buffer[: rows.stop - start].copy_(self.weight[rows])

    def chunks(self, hidden: Tensor, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the rows and their logits, in a buffer that the next chunk reuses; float32 for half precision."""
        hidden, num_rows, dtype = hidden.contiguous(), hidden.shape[0], computed_in(hidden)
        num_chunks = max(1, -(-num_rows // chunk_size))
        size = max(1, -(-num_rows // num_chunks))  # so that chunks are of nearly one size
        buffer = hidden.new_empty((size, self.weight.shape[0]), dtype=dtype)
        for start in range(0, num_rows, size):
            rows = slice(start, min(start + size, num_rows))
            yield rows, self._logits(hidden[rows], buffer[: rows.stop - start])

    def _logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        if hidden.dtype != out.dtype and out.is_cuda:  # tensor cores, the sum kept in float32
            torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
        else:
            hidden = hidden.to(out.dtype)
            for block, weight in self.weight_blocks(out.dtype):
                torch.mm(hidden, weight.t(), out=out[:, block])
        if self.bias is not None:
            out.add_(self.bias)
        return out if self.cap is None else out.mul_(self.scale / self.cap).tanh_().mul_(self.cap)

    def turn_into_gradient(self, logits: Tensor, upstream: list[Tensor | None], rows: list[Tensor]) -> None:
        """Writes d loss / d x over the logits, but for the scale that `temperatures` holds."""
        slope = None if self.cap is None else (logits / self.cap).square_().neg_().add_(1).mul_(self.scale)
        torch.ops.fastrlhf.token_logprobs_backward_(*upstream, logits, *rows)
        if slope is not None:
            logits.mul_(slope)

    def hidden_gradient(self, grad_logits: Tensor) -> Tensor:
        """grad_logits weight, summed in the dtype of grad_logits."""
        if self.weight.dtype != grad_logits.dtype and grad_logits.is_cuda:
            return torch.mm(grad_logits.to(self.weight.dtype), self.weight, out_dtype=grad_logits.dtype)
        out = grad_logits.new_zeros(grad_logits.shape[0], self.weight.shape[1])
        for block, weight in self.weight_blocks(grad_logits.dtype):
            out.addmm_(grad_logits[:, block], weight)
        return out


def linear_token_logprobs_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    logits = hidden.to(computed_in(hidden)) @ weight.to(computed_in(hidden)).t()
    logits = logits if bias is None else logits + bias
    if logit_softcap is None:
        return token_logprobs_ref(logits, targets, temperature / logit_scale)
    return token_logprobs_ref(logit_softcap * (logit_scale * logits / logit_softcap).tanh(), targets, temperature)


def _dense(weight: Tensor) -> Tensor:
    """The weight itself if rows or columns lie side by side, as matrix products want them."""
    return weight if 1 in weight.stride() else weight.contiguous()


def _fake(hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """New tensors for logprobs, entropy, highest and log_sum of the chunks' logits, each (T,)."""
    return tuple(hidden.new_empty(hidden.shape[0], dtype=computed_in(hidden)) for _ in range(4))


def _forward_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    head, outputs = _Head(_dense(weight), bias, logit_scale, logit_softcap), _fake(hidden)
    temperature = head.temperatures(temperature, hidden.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, logits in head.chunks(hidden, chunk_size):
            results = torch.ops.fastrlhf.token_logprobs(logits, targets[rows], temperature[rows])
            for output, result in zip(outputs, results, strict=True):
                output[rows] = result
    return outputs


def _used_rows(grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """The indices of rows with a gradient that is not 0."""
    grads = [g for g in (grad_logprobs, grad_entropy) if g is not None]
    return torch.stack([g != 0 for g in grads]).any(0).nonzero()[:, 0]


def _backward_chunks(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    entropy: Tensor,
    highest: Tensor,
    log_sum: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    chunk_size: int,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    head, used = _Head(_dense(weight), bias, logit_scale, logit_softcap), _used_rows(grad_logprobs, grad_entropy)
    grad_hidden, grad_weight, grad_bias = _gradients(hidden, weight, wanted, computed_in(hidden))
    temperature = head.temperatures(temperature, hidden.shape[0])
    g, h, rest = grad_logprobs, grad_entropy, [targets, temperature, entropy, highest, log_sum]
    if used.shape[0] < hidden.shape[0]:
        hidden, *rest = (t.index_select(0, used) for t in (hidden, *rest))
        g, h = (None if t is None else t.index_select(0, used) for t in (g, h))
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, logits in head.chunks(hidden, chunk_size):
            upstream = [None if t is None else t[rows] for t in (g, h)]
            head.turn_into_gradient(logits, upstream, [t[rows] for t in rest])
            if wanted[0]:
                grad_hidden.index_copy_(0, used[rows], head.hidden_gradient(logits).to(hidden.dtype))
            if wanted[1]:
                _add_product(grad_weight, logits, hidden[rows])
            if wanted[2]:
                grad_bias += logits.sum(0)
    return grad_hidden, grad_weight.to(hidden.dtype), grad_bias.to(hidden.dtype)


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """total += grad_logits^T hidden, in the dtype of `total`: float32 for half precision."""
    if hidden.dtype != total.dtype and total.is_cuda:
        total += torch.mm(grad_logits.to(hidden.dtype).t(), hidden, out_dtype=total.dtype)
    else:
        total.addmm_(grad_logits.t(), hidden.to(total.dtype))


def _gradients(hidden: Tensor, weight: Tensor, wanted: list[bool], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Zeros for the gradients of hidden, and in `dtype` of weight and bias; empty where none is wanted."""
    shapes, dtypes = (hidden.shape, weight.shape, weight.shape[:1]), (hidden.dtype, dtype, dtype)
    return tuple(hidden.new_zeros(s if w else 0, dtype=d) for s, d, w in zip(shapes, dtypes, wanted, strict=True))


def _fake_backward(g: Any, h: Any, hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _gradients(hidden, weight, args[-1], hidden.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.options = inputs[5:]


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 8
    grads = _gradient(grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.options, wanted)
    hidden, weight, bias = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return hidden, weight, None, bias, None, None, None, None


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    for num_rows, width, size, chunk_size in [(0, 3, 5, 2), (1, 1, 1, 4), (4, 3, 5, 3), (70, 33, 1200, 32)]:
        hidden, weight = (torch.randn(n, width, generator=generator) for n in (num_rows, size))
        hidden, weight = hidden.to(device, dtype), (weight * width**-0.5).to(device, dtype)
        targets = torch.randint(size, (num_rows,), generator=generator).to(device)
        yield hidden, weight, targets, None, torch.ones(1, device=device, dtype=wide), 1.0, None, chunk_size
        if num_rows <= 1:
            continue
        bias = torch.randn(size, generator=generator).to(device, dtype)
        temperature = torch.linspace(0.5, 2.0, num_rows).to(device, wide)
        yield hidden, weight, targets, bias, temperature, 0.7, None, chunk_size
        yield hidden, weight, targets, bias, temperature, 1.3, 2.5, chunk_size


_OPTIONS = "float logit_scale, float? logit_softcap, int chunk_size"
_forward = leaf(
    "linear_token_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor temperature,"
    f" {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    ref=_forward_chunks,
    fake=_fake,
    cpu=_forward_chunks,  # native in that the logits of a chunk go through the kernels of token_logprobs
)
_gradient = leaf(
    "linear_token_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor hidden, Tensor weight,"
    " Tensor targets, Tensor? bias, Tensor temperature, Tensor entropy, Tensor highest, Tensor log_sum,"
    f" {_OPTIONS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    ref=_backward_chunks,
    fake=_fake_backward,
    cpu=_backward_chunks,
)
_op = op(
    _forward,
    reference=linear_token_logprobs_ref,
    samples=samples,
    grads=("hidden", "weight", "bias"),
    setup_context=_setup_context,
    backward=_backward,
)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor) -> None:
    name = "linear_token_logprobs"
    same_device(name, hidden=hidden, weight=weight, targets=targets, bias=bias, temperature=temperature)
    dtype_in(name, "hidden", hidden, FLOATS)
    dtype_in(name, "weight", weight, (hidden.dtype,))
    dtype_in(name, "targets", targets, (torch.int64,))
    has_shape(name, "hidden", hidden, (None, None), "(T, D)")
    has_shape(name, "weight", weight, (None, hidden.shape[1]), "(V, D)")
    has_shape(name, "targets", targets, hidden.shape[:1], "(T,)")
    if weight.shape[0] == 0:
        raise ValueError(f"{name}: weight must have at least one row, got {tuple(weight.shape)}")
    if bias is not None:
        dtype_in(name, "bias", bias, (hidden.dtype,))
        has_shape(name, "bias", bias, weight.shape[:1], "(V,)")
    one_or_all(name, temperature, hidden.shape[0])
    indices_below(name, "targets", targets, weight.shape[0])


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int = 512,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns `token_logprobs(logits, targets)` of logits = hidden weight^T + bias, made a chunk of rows at a time.

    With logit_scale the logits are multiplied by it; then with logit_softcap they are cap tanh(logits / cap).

    hidden: (T, D) float32|float64|bfloat16|float16, rows that predict the targets
    weight: (V, D) like hidden, such as lm_head.weight
    targets: (T,) int64 in [0, V); elsewhere than on the CPU a target out of range gives NaN for its row
    bias: (V,) like hidden
    temperature: a number or (T,), above 0; gets no gradient
    logprobs, entropy: (T,) float32 whatever the inputs (float64 for float64); return_entropy asks for the second
    chunk_size: rows whose logits exist at a time, in float32: chunk_size x V x 4 bytes, twice with a soft cap

    Half-precision inputs are multiplied with float32 sums and results, and their weight gradient is summed in float32
    over all chunks. Backward makes the logits again; it leaves out rows whose upstream gradient is 0, and the products
    for what needs no gradient (a frozen head costs one product less). A second derivative raises. Deterministic.
    Raises: ValueError for shapes, devices, targets or options that do not fit, TypeError for dtypes.
    Source: Gemma 2, arXiv 2408.00118, section 2 (soft cap).
    """
    name = "linear_token_logprobs"
    scale = temperature_of(name, temperature, hidden)
    _check(hidden, weight, targets, bias, scale)
    for option, value in (("logit_scale", logit_scale), ("logit_softcap", logit_softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}: {option} must be above 0 and finite, got {value}")
    if chunk_size < 1:
        raise ValueError(f"{name}: chunk_size must be at least 1, got {chunk_size}")
    logprobs, entropy, *_ = _op(hidden, weight, targets, bias, scale, logit_scale, logit_softcap, chunk_size)
    return (logprobs, entropy) if return_entropy else logprobs
