"""Divergence of the distributions under two linear heads, from hidden states: no (T, V) logits exist at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrlhf.ops._check import dtype_in, has_shape, same_device
from fastrlhf.ops._linear import Gradients, Head, even_cuts, used_rows
from fastrlhf.ops._linear_inputs import gathered, head_of, rows_within, wanted_gradients
from fastrlhf.ops._registry import leaf, op
from fastrlhf.ops.kl_divergence import check_divergence, kl_divergence_ref
from fastrlhf.ops.token_logprobs import FLOATS, computed_in


def _heads(tensors: Sequence[Tensor], chunk_size: int) -> list[Head]:
    """The two heads, plain ones."""
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [Head.split((*pair, None, None, None, 1.0, 1.0, None, chunk_size, False))[0] for pair in pairs]


def linear_kl_divergence_ref(*args: Any) -> tuple[Tensor, ...]:
    *tensors, temperature, jensen_shannon, chunk_size, num_saved = args
    first, second = (head.logits_ref() for head in _heads(tensors, chunk_size))
    saved = torch.stack([first[:num_saved], second[:num_saved]]).detach()
    return *kl_divergence_ref(first, second, temperature, jensen_shannon), saved


def _fake(hidden_p: Tensor, weight_p: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """New tensors for the divergence (T,), the statistics of kl_divergence (T, 6) and logits to keep (2, kept, V)."""
    num_rows, wide = hidden_p.shape[0], computed_in(hidden_p)
    shapes = (num_rows,), (num_rows, 6), (2, args[-1], weight_p.shape[0])
    return tuple(hidden_p.new_empty(shape, dtype=wide) for shape in shapes)


def _forward_chunks(*args: Any) -> tuple[Tensor, ...]:
    *tensors, temperature, jensen_shannon, chunk_size, num_saved = args
    divergence, statistics, saved = _fake(*tensors, num_saved)
    heads, cuts = _heads(tensors, chunk_size), even_cuts(0, divergence.shape[0], chunk_size)
    buffers = [head.buffer(cuts) for head in heads]
    with torch.autocast(divergence.device.type, enabled=False):
        for rows in cuts:
            logits = [head.rows(rows).logits(buffer) for head, buffer in zip(heads, buffers, strict=True)]
            divergence[rows], statistics[rows] = torch.ops.fastrlhf.kl_divergence(*logits, temperature, jensen_shannon)
            for kept, made in zip(saved, logits, strict=True):
                kept[rows].copy_(made[: kept[rows].shape[0]])
    return divergence, statistics, saved


def _backward_chunks(*args: Any) -> tuple[Tensor, ...]:
    grad, *tensors, statistics, saved, temperature, jensen_shannon, chunk_size, wanted = args
    used = used_rows(grad)
    num_used, num_saved = used.shape[0], int((used < saved.shape[1]).sum())
    heads, sides = _heads(tensors, chunk_size), [[*side, False, False, False] for side in (wanted[:2], wanted[2:])]
    grads = [Gradients.zeros(head, side, head.hidden.dtype) for head, side in zip(heads, sides, strict=True)]
    if num_used < grad.shape[0]:
        grad, statistics, heads = grad[used], statistics[used], [head.rows(used) for head in heads]
    cuts = even_cuts(0, num_saved, chunk_size) + even_cuts(num_saved, num_used, chunk_size)
    buffers = [head.buffer(cuts) for head in heads]
    with torch.autocast(grad.device.type, enabled=False):
        for rows in cuts:
            chunks = [head.rows(rows) for head in heads]
            if rows.start < num_saved:
                made = zip(saved, (buffer[: rows.stop - rows.start] for buffer in buffers), strict=True)
                logits = [torch.index_select(kept, 0, used[rows], out=out) for kept, out in made]
            else:
                logits = [chunk.logits(buffer) for chunk, buffer in zip(chunks, buffers, strict=True)]
            options = statistics[rows], temperature, jensen_shannon, [any(side) for side in sides]
            torch.ops.fastrlhf.kl_divergence_backward_(grad[rows], *logits, *options)
            for sums, chunk, of_logits in zip(grads, chunks, logits, strict=True):
                sums.add(chunk, of_logits, used[rows])
    return tuple(g.to(tensors[0].dtype) for sums in grads for g in (sums.hidden, sums.weight))


def _fake_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) if want else t.new_empty(0) for t, want in zip(args[:4], args[-1], strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.options = inputs[4:-1]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    wanted = list(ctx.needs_input_grad[:4])
    grads = _gradient(grad, *ctx.saved_tensors, *ctx.options, wanted)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), *(None,) * 4


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for num_rows, size, chunk_size in [(0, 5, 2), (1, 1, 4), (4, 5, 3), (70, 100, 32)]:
        tensors = []
        for width in (8, 16):  # slices of rows stay aligned: the last bit of a matrix product depends on it
            hidden, weight = (torch.randn(n, width, generator=generator) for n in (num_rows, size))
            tensors += [hidden.to(device, dtype), (weight * width**-0.5).to(device, dtype)]
        for temperature, jensen_shannon, num_saved in ((1.0, False, 0), (0.7, True, 0), (0.7, False, num_rows // 2)):
            yield *tensors, temperature, jensen_shannon, chunk_size, num_saved


_TENSORS = "Tensor hidden_p, Tensor weight_p, Tensor hidden_q, Tensor weight_q"
_OPTIONS = "float temperature, bool jensen_shannon, int chunk_size"
_forward = leaf(
    f"linear_kl_divergence({_TENSORS}, {_OPTIONS}, int num_saved) -> (Tensor, Tensor, Tensor)",
    ref=_forward_chunks,
    fake=_fake,
    cpu=_forward_chunks,  # native in that the logits of a chunk go through the kernels of kl_divergence
)
_gradient = leaf(
    f"linear_kl_divergence_backward(Tensor grad, {_TENSORS}, Tensor statistics, Tensor saved, {_OPTIONS},"
    " bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    ref=_backward_chunks,
    fake=_fake_backward,
    cpu=_backward_chunks,
)
_op = op(
    _forward,
    reference=linear_kl_divergence_ref,
    samples=samples,
    grads=("hidden_p", "weight_p", "hidden_q", "weight_q"),
    setup_context=_setup_context,
    backward=_backward,
)


def _check(hidden_p: Tensor, weight_p: Tensor, hidden_q: Tensor, weight_q: Tensor) -> None:
    name = "linear_kl_divergence"
    same_device(name, hidden_p=hidden_p, weight_p=weight_p, hidden_q=hidden_q, weight_q=weight_q)
    dtype_in(name, "hidden_p", hidden_p, FLOATS)
    has_shape(name, "hidden_p", hidden_p, (None, None), "(T, D)")
    has_shape(name, "weight_p", weight_p, (None, hidden_p.shape[1]), "(V, D)")
    has_shape(name, "hidden_q", hidden_q, (hidden_p.shape[0], None), "(T, E)")
    has_shape(name, "weight_q", weight_q, (weight_p.shape[0], hidden_q.shape[1]), "(V, E)")
    for argument, tensor in (("weight_p", weight_p), ("hidden_q", hidden_q), ("weight_q", weight_q)):
        dtype_in(name, argument, tensor, (hidden_p.dtype,))
    if weight_p.shape[0] == 0:
        raise ValueError(f"{name}: weight_p must have at least one row, got {tuple(weight_p.shape)}")


def linear_kl_divergence(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    *,
    kind: str = "forward",
    temperature: float = 1.0,
    chunk_size: int = 256,
    memory_budget: int = 0,
) -> Tensor:
    """Returns `kl_divergence(hidden_p weight_p^T, hidden_q weight_q^T)`, made a chunk of rows at a time.

    hidden_p: (T, D) float32|float64|bfloat16|float16, hidden_q: (T, E) like it: of two models of any widths
    weight_p: (V, D) and weight_q: (V, E) like them, the heads. A DTensor is gathered
    kind: forward, reverse or js; temperature: above 0
    chunk_size: rows whose logits exist at a time, in float32: 2 x chunk_size x V x 4 bytes
    memory_budget: bytes of logits (a row takes 2 x V x 4) that the forward may keep, and which backward then need not
        make again: two matrix products
    divergence: (T,) float32 whatever the inputs (float64 for float64)

    Gradients for each of the four that needs one. Half-precision inputs are multiplied with float32 sums and results,
    and gradients of weights are summed in float32 over all chunks. Backward leaves out rows whose upstream gradient is
    0, and the products for what needs no gradient. A second derivative raises. Deterministic. NaN in, NaN out.
    Raises: ValueError for shapes, devices or options that do not fit, TypeError for dtypes.
    Source: as kl_divergence.
    """
    name = "linear_kl_divergence"
    weight_p, weight_q = gathered(weight_p), gathered(weight_q)
    check_divergence(name, kind, temperature)
    _check(hidden_p, weight_p, hidden_q, weight_q)
    head_of(name, hidden_p, weight_p, None, None, 1.0, None, chunk_size, False)
    tensors = hidden_p, weight_p, hidden_q, weight_q
    row = 2 * weight_p.shape[0] * computed_in(hidden_p).itemsize
    num_saved = rows_within(name, memory_budget, hidden_p.shape[0], row)
    if not any(wanted_gradients(*tensors)):
        num_saved = 0
    if kind == "reverse":
        tensors = hidden_q, weight_q, hidden_p, weight_p
    divergence, *_ = _op(*tensors, temperature, kind == "js", chunk_size, num_saved)
    return divergence
