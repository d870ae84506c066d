"""Divergence of the distributions under two linear heads, from hidden states: no (T, V) logits exist at once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf.ops._check import computed_in, dtype_in, has_shape, same_device
from fastrlhf.ops._linear import GRADIENTS, SCHEMA, Gradients, Head, even_cuts, if_fused, used_rows
from fastrlhf.ops._linear_inputs import head_of, rows_within, wanted_gradients
from fastrlhf.ops._registry import leaf, op
from fastrlhf.ops.kl_divergence import check_divergence, kl_divergence_ref

SIDE = len(Head._fields) - 2  # arguments of a head; how it is cut is said once for both
NUM_TENSORS = len(Gradients._fields)


def _split(args: tuple[Any, ...]) -> tuple[list[Head], tuple[Any, ...]]:
    """The two heads and the other arguments."""
    chunks, rest = args[2 * SIDE : 2 * SIDE + 2], args[2 * SIDE + 2 :]
    return [Head.split((*args[i : i + SIDE], *chunks))[0] for i in (0, SIDE)], rest


def _scale(head: Head) -> float:
    """Factor of this head's logits: its scale, or 1 with a soft cap, which has applied it already."""
    return head.scale if head.cap is None else 1.0


def linear_kl_divergence_ref(*args: Any) -> tuple[Tensor, ...]:
    heads, (temperature, jensen_shannon, num_saved) = _split(args)
    first, second = (head.logits_ref() * _scale(head) for head in heads)
    saved = torch.stack([first[:num_saved], second[:num_saved]]).detach()
    return *kl_divergence_ref(first, second, temperature, jensen_shannon), saved


def _fake(*args: Any) -> tuple[Tensor, ...]:
    """New tensors for the divergence (T,), the statistics of kl_divergence (T, 6) and logits to keep (2, kept, V)."""
    (head, _), (*_, num_saved) = _split(args)
    num_rows, wide = head.hidden.shape[0], computed_in(head.hidden)
    shapes = (num_rows,), (num_rows, 6), (2, num_saved, head.weight.shape[0])
    return tuple(head.hidden.new_empty(shape, dtype=wide) for shape in shapes)


def _logits(heads: list[Head], buffers: list[Tensor]) -> list[Tensor]:
    made = [head.logits(buffer) for head, buffer in zip(heads, buffers, strict=True)]
    return [
        logits.mul_(_scale(head)) if _scale(head) != 1 else logits for head, logits in zip(heads, made, strict=True)
    ]


def _forward_chunks(*args: Any) -> tuple[Tensor, ...]:
    heads, (temperature, jensen_shannon, _) = _split(args)
    divergence, statistics, saved = _fake(*args)
    cuts = even_cuts(0, divergence.shape[0], heads[0].chunk_size)
    buffers = [head.buffer(cuts) for head in heads]
    with torch.autocast(divergence.device.type, enabled=False):
        for rows in cuts:
            logits = _logits([head.rows(rows) for head in heads], buffers)
            divergence[rows], statistics[rows] = torch.ops.fastrlhf.kl_divergence(*logits, temperature, jensen_shannon)
            for kept, made in zip(saved, logits, strict=True):
                kept[rows].copy_(made[: kept[rows].shape[0]])
    return divergence, statistics, saved


def _backward_chunks(*args: Any) -> tuple[Tensor, ...]:
    heads, (grad, statistics, saved, temperature, jensen_shannon, wanted) = _split(args)
    whole, used = heads, used_rows(grad)
    num_used, num_saved = used.shape[0], int((used < saved.shape[1]).sum())
    sides = [wanted[:NUM_TENSORS], wanted[NUM_TENSORS:]]
    grads = [Gradients.zeros(head, side, head.hidden.dtype) for head, side in zip(heads, sides, strict=True)]
    if num_used < grad.shape[0]:
        grad, statistics, heads = grad[used], statistics[used], [head.rows(used) for head in heads]
    chunk_size = heads[0].chunk_size
    cuts = even_cuts(0, num_saved, chunk_size) + even_cuts(num_saved, num_used, chunk_size)
    buffers = [head.buffer(cuts) for head in heads]
    with torch.autocast(grad.device.type, enabled=False):
        for rows in cuts:
            chunks = [head.rows(rows) for head in heads]
            if rows.start < num_saved:
                made = zip(saved, (buffer[: rows.stop - rows.start] for buffer in buffers), strict=True)
                logits = [torch.index_select(kept, 0, used[rows], out=out) for kept, out in made]
            else:
                logits = _logits(chunks, buffers)
            slopes = [
                chunk.slope(z) if any(side) else None for chunk, z, side in zip(chunks, logits, sides, strict=True)
            ]
            options = statistics[rows], temperature, jensen_shannon, [any(side) for side in sides]
            torch.ops.fastrlhf.kl_divergence_backward_(grad[rows], *logits, *options)
            for sums, chunk, of_logits, slope in zip(grads, chunks, logits, slopes, strict=True):
                if slope is not None or chunk.scale != 1:
                    of_logits.mul_(chunk.scale if slope is None else slope)
                sums.add(chunk, of_logits, used[rows])
    return tuple(g for sums, head in zip(grads, whole, strict=True) for g in sums.rounded(head))


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    heads, (*_, wanted) = _split(args)
    sides = zip(heads, (wanted[:NUM_TENSORS], wanted[NUM_TENSORS:]), strict=True)
    return tuple(g for head, side in sides for g in Gradients.zeros(head, side, head.hidden.dtype).rounded(head))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(inputs[i] for i in TENSORS), *output[1:])
    ctx.inputs = [None if i in TENSORS else x for i, x in enumerate(inputs)]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    results: list[Tensor | None] = [None] * len(ctx.inputs)
    if grad is None:
        return tuple(results)
    *tensors, statistics, saved = ctx.saved_tensors
    inputs, wanted = list(ctx.inputs), [ctx.needs_input_grad[i] for i in TENSORS]
    for i, tensor in zip(TENSORS, tensors, strict=True):
        inputs[i] = tensor
    *heads, temperature, jensen_shannon, _ = inputs
    grads = _gradient(*heads, grad, statistics, saved, temperature, jensen_shannon, wanted)
    for i, of_tensor, want in zip(TENSORS, grads, wanted, strict=True):
        results[i] = of_tensor if want else None
    return tuple(results)


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device, dtype)

    for num_rows, size, chunk_size in [(0, 5, 2), (1, 1, 4), (4, 5, 3), (70, 100, 32)]:
        # slices of rows stay aligned: the last bit of a matrix product depends on it
        (hidden_p, weight_p), (hidden_q, weight_q) = ((4 * random(num_rows, n), random(size, n)) for n in (8, 16))
        plain = (None, None, None, 1.0, 1.0, None)
        for temperature, jensen_shannon, num_saved in ((1.0, False, 0), (0.7, True, 0), (0.7, False, num_rows // 2)):
            options = chunk_size, False, temperature, jensen_shannon, num_saved
            yield hidden_p, weight_p, *plain, hidden_q, weight_q, *plain, *options
        policy = hidden_p, weight_p, random(1, size)[0], random(2, 8), random(size, 2), 0.5, 0.8, None
        reference = hidden_q, weight_q, random(1, size)[0], None, None, 1.0, 1.3, 2.5
        yield *policy, *reference, chunk_size, True, 0.7, False, num_rows // 2


_SIDES = ", ".join(f"{argument}_{side}" for side in "pq" for argument in SCHEMA.split(", ")[:SIDE])
_HEADS = f"{_SIDES}, int chunk_size, bool batch_invariant"
TENSORS = [i for start in (0, SIDE) for i in range(start, start + NUM_TENSORS)]  # where they stand among the arguments
_gradient = leaf(
    f"linear_kl_divergence_backward({_HEADS}, Tensor grad, Tensor statistics, Tensor saved, float temperature,"
    f" bool jensen_shannon, bool[] wanted) -> ({GRADIENTS}, {GRADIENTS})",
    ref=_backward_chunks,
    fake=_fake_backward,
    cpu=_backward_chunks,
    cuda=if_fused(_backward_chunks),
)
_op = op(
    f"linear_kl_divergence({_HEADS}, float temperature, bool jensen_shannon, int num_saved)"
    " -> (Tensor, Tensor, Tensor)",
    ref=_forward_chunks,
    fake=_fake,
    cpu=_forward_chunks,  # native in that the logits of a chunk go through the kernels of kl_divergence
    cuda=if_fused(_forward_chunks),
    reference=linear_kl_divergence_ref,
    samples=samples,
    grads=tuple(f"{name}_{side}" for side in "pq" for name in Gradients._fields),
    setup_context=_setup_context,
    backward=_backward,
)


def _pair(function: str, name: str, given: Any) -> tuple[Any, Any]:
    """An option of both heads or of each."""
    pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
    if len(pair) != 2:
        raise ValueError(f"{function}: {name} must be one for both heads or two, got {len(pair)}")
    return pair


def linear_kl_divergence(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    *,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    lora_p: tuple[Tensor, Tensor, float] | None = None,
    lora_q: tuple[Tensor, Tensor, float] | None = None,
    kind: str = "forward",
    temperature: float = 1.0,
    logit_scale: float | tuple[float, float] = 1.0,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    chunk_size: int = 256,
    batch_invariant: bool = False,
    memory_budget: int = 0,
) -> Tensor:
    """Returns `kl_divergence(hidden_p weight_p^T, hidden_q weight_q^T)`, made a chunk of rows at a time.

    hidden_p: (T, D) float32|float64|bfloat16|float16, hidden_q: (T, E) like it: of two models of any widths
    weight_p: (V, D) and weight_q: (V, E) like them, the heads. A DTensor is gathered
    bias_p, bias_q: (V,) like them; lora_p, lora_q: low-rank changes of the weights; both, and logit_scale and
        logit_softcap (each one for both heads, or a pair), as in `linear_token_logprobs`; so is batch_invariant
    kind: forward, reverse or js; temperature: above 0
    chunk_size: rows whose logits exist at a time, in float32: 2 x chunk_size x V x 4 bytes, twice with a soft cap
    memory_budget: bytes of logits (a row takes 2 x V x 4) that the forward may keep, and which backward then need not
        make again: two matrix products
    divergence: (T,) float32 whatever the inputs (float64 for float64)

    Gradients for each tensor that needs one. Half-precision inputs are multiplied with float32 sums and results,
    and gradients of weights are summed in float32 over all chunks. Backward leaves out rows whose upstream gradient is
    0, and the products for what needs no gradient. A second derivative raises. Deterministic. NaN in, NaN out.
    Raises: ValueError for shapes, devices or options that do not fit, TypeError for dtypes.
    Source: as kl_divergence.
    """
    name = "linear_kl_divergence"
    check_divergence(name, kind, temperature)
    scales, caps = _pair(name, "logit_scale", logit_scale), _pair(name, "logit_softcap", logit_softcap)
    same_device(name, hidden_p=hidden_p, weight_p=weight_p, hidden_q=hidden_q, weight_q=weight_q)
    cut = chunk_size, batch_invariant
    p = head_of(name, hidden_p, weight_p, bias_p, lora_p, scales[0], caps[0], *cut, suffix="_p")
    dtype_in(name, "hidden_q", hidden_q, (hidden_p.dtype,))
    has_shape(name, "hidden_q", hidden_q, (hidden_p.shape[0], None), "(T, E)")
    has_shape(name, "weight_q", weight_q, (weight_p.shape[0], hidden_q.shape[1]), "(V, E)")
    q = head_of(name, hidden_q, weight_q, bias_q, lora_q, scales[1], caps[1], *cut, suffix="_q")
    row = 2 * weight_p.shape[0] * computed_in(hidden_p).itemsize
    num_saved = rows_within(name, memory_budget, hidden_p.shape[0], row)
    if not any(wanted_gradients(*p.tensors, *q.tensors)):
        num_saved = 0
    first, second = (q, p) if kind == "reverse" else (p, q)
    divergence, *_ = _op(*first[:SIDE], *second[:SIDE], *cut, temperature, kind == "js", num_saved)
    return divergence
