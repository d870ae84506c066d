"""Log-probabilities and entropies under a linear head, from hidden states: the (T, V) logits never exist at once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf.ops._check import same_device
from fastrlhf.ops._linear import SCHEMA, Gradients, Head, even_cuts, used_rows
from fastrlhf.ops._linear_inputs import check_targets, checked, rows_within, wanted_gradients
from fastrlhf.ops._linear_inputs import samples as head_samples
from fastrlhf.ops._registry import leaf, op
from fastrlhf.ops.token_logprobs import computed_in, one_or_all, temperature_of, token_logprobs_ref

NUM_TENSORS = len(Gradients._fields)


def linear_token_logprobs_ref(*args: Any) -> tuple[Tensor, ...]:
    head, (targets, temperature, num_saved) = Head.split(args)
    logits = head.logits_ref()
    return *token_logprobs_ref(logits, targets, head.temperatures(temperature)), logits[:num_saved].detach()


def _fake(*args: Any) -> tuple[Tensor, ...]:
    """New tensors for logprobs, entropy, highest and log_sum of the chunks' logits, each (T,), and logits to keep."""
    head, (*_, num_saved) = Head.split(args)
    shapes = *[head.hidden.shape[:1]] * 4, (num_saved, head.weight.shape[0])
    return tuple(head.hidden.new_empty(shape, dtype=computed_in(head.hidden)) for shape in shapes)


def _forward_chunks(*args: Any) -> tuple[Tensor, ...]:
    head, (targets, temperature, _) = Head.split(args)
    *outputs, saved = _fake(*args)
    temperature = head.temperatures(temperature)
    cuts = even_cuts(0, targets.shape[0], head.chunk_size)
    buffer = head.buffer(cuts)
    with torch.autocast(targets.device.type, enabled=False):
        for rows in cuts:
            logits = head.rows(rows).logits(buffer)
            results = torch.ops.fastrlhf.token_logprobs(logits, targets[rows], temperature[rows])
            for output, result in zip(outputs, results, strict=True):
                output[rows] = result
            kept = saved[rows]
            kept.copy_(logits[: kept.shape[0]])
    return *outputs, saved


def _backward_chunks(*args: Any) -> tuple[Tensor, ...]:
    head, (targets, temperature, *upstream, entropy, highest, log_sum, saved, wanted) = Head.split(args)
    used = used_rows(*upstream)
    num_used, num_saved = used.shape[0], int((used < saved.shape[0]).sum())
    grads = Gradients.zeros(head, wanted, head.hidden.dtype)
    rest = [targets, head.temperatures(temperature), entropy, highest, log_sum]
    used_head = head
    if num_used < targets.shape[0]:
        used_head, rest = head.rows(used), [t.index_select(0, used) for t in rest]
        upstream = [None if t is None else t.index_select(0, used) for t in upstream]
    cuts = even_cuts(0, num_saved, head.chunk_size) + even_cuts(num_saved, num_used, head.chunk_size)
    buffer = head.buffer(cuts)
    with torch.autocast(targets.device.type, enabled=False):
        for rows in cuts:
            chunk = used_head.rows(rows)
            if rows.start < num_saved:
                logits = torch.index_select(saved, 0, used[rows], out=buffer[: rows.stop - rows.start])
            else:
                logits = chunk.logits(buffer)
            of_rows = [None if t is None else t[rows] for t in upstream]
            chunk.turn_into_gradient(logits, of_rows, [t[rows] for t in rest])
            grads.add(chunk, logits, used[rows])
    return grads.rounded(head)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    head, (*_, wanted) = Head.split(args)
    return Gradients.zeros(head, wanted, head.hidden.dtype).rounded(head)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    head, (targets, temperature, _) = Head(*inputs[: len(Head._fields)]), inputs[len(Head._fields) :]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*head.tensors, targets, temperature, *output[1:])
    ctx.options = head[NUM_TENSORS:]


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    tensors, (targets, temperature, *saved) = ctx.saved_tensors[:NUM_TENSORS], ctx.saved_tensors[NUM_TENSORS:]
    wanted, constants = list(ctx.needs_input_grad[:NUM_TENSORS]), (None,) * (len(ctx.options) + 3)
    if grad_logprobs is None and grad_entropy is None:
        return *(None for _ in wanted), *constants
    rows = targets, temperature, grad_logprobs, grad_entropy
    grads = _gradient(*tensors, *ctx.options, *rows, *saved, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *constants


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for head, targets, temperature in head_samples(device, dtype):
        num_saved = 0 if head.bias is None else targets.shape[0] // (1 if head.batch_invariant else 2)
        yield *head, targets, temperature, num_saved


_forward = leaf(
    f"linear_token_logprobs({SCHEMA}, Tensor targets, Tensor temperature, int num_saved)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    ref=_forward_chunks,
    fake=_fake,
    cpu=_forward_chunks,  # native in that the logits of a chunk go through the kernels of token_logprobs
)
_gradient = leaf(
    f"linear_token_logprobs_backward({SCHEMA}, Tensor targets, Tensor temperature, Tensor? grad_logprobs,"
    " Tensor? grad_entropy, Tensor entropy, Tensor highest, Tensor log_sum, Tensor saved, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor)",
    ref=_backward_chunks,
    fake=_fake_backward,
    cpu=_backward_chunks,
)
_op = op(
    _forward,
    reference=linear_token_logprobs_ref,
    samples=samples,
    grads=Gradients._fields,
    setup_context=_setup_context,
    backward=_backward,
)


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
    batch_invariant: bool = False,
    memory_budget: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns `token_logprobs(logits, targets)` of logits = hidden weight^T + bias, made a chunk of rows at a time.

    With logit_scale the logits are multiplied by it; then with logit_softcap they are cap tanh(logits / cap).

    hidden: (T, D) float32|float64|bfloat16|float16, rows that predict the targets
    weight: (V, D) like hidden, such as lm_head.weight or, where they are tied, that of the embedding. A DTensor is
        gathered and its gradient taken to be the same on all ranks; where it is not, gather it before, with
        full_tensor(grad_placements=...). A LoRA on the head is weight + scale * (b @ a)
    targets: (T,) int64 in [0, V); elsewhere than on the CPU a target out of range gives NaN for its row
    bias: (V,) like hidden
    temperature: a number or (T,), above 0; gets no gradient
    logprobs, entropy: (T,) float32 whatever the inputs (float64 for float64); return_entropy asks for the second
    chunk_size: rows whose logits exist at a time, in float32: chunk_size x V x 4 bytes, twice with a soft cap
    batch_invariant: makes what a row gets (its gradient in hidden too) independent of the other rows, bit for bit. Rows
        are computed in tiles of chunk_size, a multiple of 64, the last filled with zeros, so that every matrix product
        has one shape. It rests on the matrix library treating the rows of a product alike, as MKL does, for one
        chunk_size, number of threads and machine; not tried on a GPU. Gradients in weight and bias are sums over rows
    memory_budget: bytes of logits (a row takes V x 4) that the forward may keep for a backward. What is kept need not
        be made again: with all rows a backward takes two matrix products in place of three

    Half-precision inputs are multiplied with float32 sums and results, and their weight gradient is summed in float32
    over all chunks. Backward makes the logits again; it leaves out rows whose upstream gradient is 0, and the products
    for what needs no gradient (a frozen head costs one product less). A second derivative raises. Deterministic.
    Raises: ValueError for shapes, devices, targets or options that do not fit, TypeError for dtypes.
    Source: Gemma 2, arXiv 2408.00118, section 2 (soft cap).
    """
    name = "linear_token_logprobs"
    options = logit_scale, logit_softcap, chunk_size, batch_invariant
    head = checked(name, Head(hidden, weight, bias, *options))
    check_targets(name, head, targets)
    temperature = temperature_of(name, temperature, hidden)
    same_device(name, hidden=hidden, temperature=temperature)
    one_or_all(name, temperature, hidden.shape[0])
    num_saved = rows_within(name, memory_budget, hidden.shape[0], head.weight.shape[0] * computed_in(hidden).itemsize)
    if not any(wanted_gradients(*head.tensors)):
        num_saved = 0
    logprobs, entropy, *_ = _op(*head, targets, temperature, num_saved)
    return (logprobs, entropy) if return_entropy else logprobs
