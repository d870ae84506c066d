"""Log-probabilities and entropies under a linear head, from hidden states: the (T, V) logits never exist at once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf.ops._check import computed_in, one_or_all, same_device, temperature_of
from fastrlhf.ops._linear import GRADIENTS, SCHEMA, Gradients, Head, even_cuts, if_fused
from fastrlhf.ops._linear_backward import (
    GRADIENT,
    LOGITS,
    PRODUCT,
    by_columns,
    by_rows,
    columns_are_smaller,
    scaled,
    to_keep,
    units,
)
from fastrlhf.ops._linear_inputs import check_targets, head_of, rows_within, wanted_gradients
from fastrlhf.ops._linear_inputs import samples as head_samples
from fastrlhf.ops._registry import leaf, op
from fastrlhf.ops.token_logprobs import logsumexp_of, token_logprobs_ref

NUM_TENSORS = len(Gradients._fields)


def linear_token_logprobs_ref(*args: Any) -> tuple[Tensor, ...]:
    head, (targets, temperature, kind, num_kept, *top1) = Head.split(args)
    logits, divisor = head.logits_ref(), head.temperatures(temperature)
    logprobs, *outputs = token_logprobs_ref(logits, targets, divisor)
    first = (logits.argmax(-1) == targets)[: targets.shape[0] if any(top1) else 0]
    if kind == LOGITS:
        return logprobs, *outputs, logits[:num_kept].detach(), first
    with torch.enable_grad():
        leaf_head = head._replace(hidden=head.hidden.detach().to(logits.dtype).requires_grad_())
        again = leaf_head.logits_ref()
        total = (token_logprobs_ref(again, targets, divisor)[0] * units(head, temperature)).sum()
        (kept,) = torch.autograd.grad(total, leaf_head.hidden if kind == PRODUCT else again)
    if kind == GRADIENT and head.cap is not None:
        kept = kept * head.scale * (1 - (logits.detach() / head.cap) ** 2)
    kept = kept.to(head.hidden.dtype) if kind == GRADIENT else kept
    return logprobs, *(t.detach() for t in outputs), kept[:num_kept], first


def _fake(*args: Any) -> tuple[Tensor, ...]:
    """New tensors for logprobs, entropy, highest and log_sum of the chunks' logits, each (T,), for what is kept, and,
    if they are asked for, which targets are the likeliest tokens."""
    head, (*_, kind, num_kept, top1) = Head.split(args)
    wide = computed_in(head.hidden)
    num_rows, shape = head.hidden.shape[0], (num_kept, head.weight.shape[int(kind == PRODUCT)])
    of_rows = (head.hidden.new_empty(num_rows, dtype=wide) for _ in range(4))
    kept = head.hidden.new_empty(shape, dtype=head.hidden.dtype if kind == GRADIENT else wide)
    return *of_rows, kept, head.hidden.new_empty(num_rows if top1 else 0, dtype=torch.bool)


def _forward_chunks(*args: Any) -> tuple[Tensor, ...]:
    head, (targets, temperature, kind, num_kept, top1) = Head.split(args)
    *outputs, kept, first_choice = _fake(*args)
    unit, temperature = units(head, temperature), head.temperatures(temperature)
    cuts = even_cuts(0, targets.shape[0], head.chunk_size)
    buffer = head.buffer(cuts)
    with torch.autocast(targets.device.type, enabled=False):
        for rows in cuts:
            in_place = kind != PRODUCT and rows.stop <= num_kept and kept.dtype == buffer.dtype and not head.tile
            logits = head.rows(rows).logits(kept[rows] if in_place else buffer)
            results = torch.ops.fastrlhf.token_logprobs(logits, targets[rows], temperature[rows])
            for output, result in zip(outputs, results, strict=True):
                output[rows] = result
            if top1:
                first_choice[rows] = logits.argmax(-1) == targets[rows]
            first = slice(rows.start, min(rows.stop, num_kept))
            if first.start < first.stop:
                of_rows = [t[first] for t in (targets, temperature, *outputs[1:])]
                logits = logits[: first.stop - first.start]
                made = to_keep(kind, head.rows(first), logits, unit[first], of_rows)
                if not in_place:
                    kept[first] = made
    return *outputs, kept, first_choice


def _backward_chunks(*args: Any) -> tuple[Tensor, ...]:
    head, (targets, temperature, *upstream, entropy, highest, log_sum, kept, kind, wanted) = Head.split(args)
    factor = None if upstream[0] is None else upstream[0] / units(head, temperature)
    if kind == PRODUCT:
        if factor is not None and wanted[0] and not any(wanted[1:]):
            grads = Gradients.zeros(head, [False] * len(wanted), head.hidden.dtype)
            return grads._replace(hidden=scaled(kept, factor, head.hidden.dtype)).rounded(head)
        kept = kept[:0]  # it is no gradient of the head
    rows = [targets, head.temperatures(temperature), entropy, highest, log_sum]
    with torch.autocast(targets.device.type, enabled=False):
        if columns_are_smaller(head, kept.shape[0], wanted):
            grads = by_columns(head, upstream, rows, wanted)
        else:
            grads = by_rows(head, upstream, rows, kept, factor if kind == GRADIENT else None, wanted)
    return grads.rounded(head)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    head, (*_, wanted) = Head.split(args)
    return Gradients.zeros(head, wanted, head.hidden.dtype).rounded(head)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    head, (targets, temperature, kind, *_) = Head(*inputs[: len(Head._fields)]), inputs[len(Head._fields) :]
    ctx.mark_non_differentiable(*output[2 if kind == LOGITS else 1 :])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*head.tensors, targets, temperature, *output[1:-1])
    ctx.options, ctx.kind = head[NUM_TENSORS:], kind


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    tensors, (targets, temperature, *saved) = ctx.saved_tensors[:NUM_TENSORS], ctx.saved_tensors[NUM_TENSORS:]
    wanted, constants = list(ctx.needs_input_grad[:NUM_TENSORS]), (None,) * (len(ctx.options) + 5)
    if grad_logprobs is None and grad_entropy is None:
        return *(None for _ in wanted), *constants
    rows = targets, temperature, grad_logprobs, grad_entropy
    grads = _gradient(*tensors, *ctx.options, *rows, *saved, ctx.kind, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *constants


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for head, targets, temperature in head_samples(device, dtype):
        num_rows = targets.shape[0]
        yield *head, targets, temperature, LOGITS, 0, True
        if head.bias is not None:
            for kind, num_kept in ((LOGITS, num_rows // 2), (GRADIENT, num_rows // 2), (PRODUCT, num_rows)):
                yield *head, targets, temperature, kind, num_kept, False


_gradient = leaf(
    f"linear_token_logprobs_backward({SCHEMA}, Tensor targets, Tensor temperature, Tensor? grad_logprobs,"
    " Tensor? grad_entropy, Tensor entropy, Tensor highest, Tensor log_sum, Tensor kept, str kind, bool[] wanted)"
    f" -> ({GRADIENTS})",
    ref=_backward_chunks,
    fake=_fake_backward,
    cpu=_backward_chunks,
    cuda=if_fused(_backward_chunks),
)
_op = op(
    f"linear_token_logprobs({SCHEMA}, Tensor targets, Tensor temperature, str kind, int num_kept, bool top1)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ref=_forward_chunks,
    fake=_fake,
    cpu=_forward_chunks,  # native in that the logits of a chunk go through the kernels of token_logprobs
    cuda=if_fused(_forward_chunks),
    reference=linear_token_logprobs_ref,
    samples=samples,
    grads=Gradients._fields,
    setup_context=_setup_context,
    backward=_backward,
)


def _kind_to_keep(function: str, head: Head, entropy: bool, memory_budget: int) -> tuple[str, int]:
    """What the forward keeps for a backward, and of how many rows."""
    # a row's gradient is rounded otherwise where it was kept, and which rows are kept depends on the others
    kind = LOGITS if entropy or head.batch_invariant else GRADIENT
    itemsize = (head.hidden.dtype if kind == GRADIENT else computed_in(head.hidden)).itemsize
    num_kept = rows_within(function, memory_budget, head.hidden.shape[0], head.weight.shape[0] * itemsize)
    of_hidden, *of_head = wanted_gradients(*head.tensors)
    if of_hidden and not entropy and not any(of_head):
        return PRODUCT, head.hidden.shape[0]
    return kind, num_kept if of_hidden or any(of_head) else 0


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    return_logsumexp: bool = False,
    return_top1: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int = 512,
    batch_invariant: bool = False,
    memory_budget: int = 0,
) -> Any:
    """Returns `token_logprobs(logits, targets)` of logits = hidden weight^T + bias, made a chunk of rows at a time.

    With lora = (a, b, scale) the weight is weight + scale b a, by scale (hidden a^T) b^T added to the logits, so that a
    frozen weight has no gradient to be made. With logit_scale the logits are multiplied by it; then with logit_softcap
    they are cap tanh(logits / cap).

    hidden: (T, D) float32|float64|bfloat16|float16, rows that predict the targets
    weight: (V, D) like hidden, such as lm_head.weight or, where they are tied, that of the embedding. A DTensor is
        gathered and its gradient taken to be the same on all ranks; where it is not, gather it before, with
        full_tensor(grad_placements=...)
    targets: (T,) int64 in [0, V); elsewhere than on the CPU a target out of range gives NaN for its row
    bias: (V,) like hidden
    lora: a (r, D) and b (V, r), each like hidden or float32, and a finite number; of PEFT's layers lora_A.weight,
        lora_B.weight and scaling. Computed in float32 (float64 for float64), hidden a^T too
    temperature: a number or (T,), above 0; gets no gradient
    logprobs, entropy: (T,) float32 whatever the inputs (float64 for float64); return_entropy asks for the second
    return_logsumexp: asks for one more, as in `token_logprobs`, detached, of the logits divided by the temperature
    return_top1: asks for one more, (T,) bool: whether the target is the likeliest token, the first of equals. It costs
        another read of a chunk's logits
    chunk_size: rows whose logits exist at a time, in float32: chunk_size x V x 4 bytes, twice with a soft cap
    batch_invariant: makes what a row gets (its gradient in hidden too) independent of the other rows, bit for bit. Rows
        are computed in tiles of chunk_size, a multiple of 64, the last filled with zeros, so that every matrix product
        has one shape. It rests on the matrix library treating the rows of a product alike, as MKL does, for one
        chunk_size, number of threads and machine; not tried on a GPU. Gradients in weight and bias are sums over rows
    memory_budget: bytes that the forward may keep for a backward, so that logits need not be made again, and with all
        rows it takes two matrix products in place of three. A row takes V x 4, of logits; where log-probabilities alone
        are returned, its gradient is kept instead in the dtype of hidden, V x 2 for half precision, which costs about
        the accuracy of that dtype once more (not with batch_invariant)

    Half-precision inputs are multiplied with float32 sums and results, and their weight gradient is summed in float32
    over all chunks. Backward makes the logits again; it leaves out rows whose upstream gradient is 0, and the products
    for what needs no gradient. Where hidden alone needs one, of log-probabilities alone, the forward makes it up to a
    factor, (T, D) float32: two matrix products in all in place of three. For half precision with T <= V / 8, nothing
    kept and not batch_invariant, backward takes the vocabulary in blocks of at most chunk_size x V logits of all rows:
    then the gradient of weight is never held in float32. A second derivative raises. Deterministic.
    Raises: ValueError for shapes, devices, targets or options that do not fit, TypeError for dtypes.
    Source: Gemma 2, arXiv 2408.00118, section 2 (soft cap).
    """
    name = "linear_token_logprobs"
    head = head_of(name, hidden, weight, bias, lora, logit_scale, logit_softcap, chunk_size, batch_invariant)
    check_targets(name, head, targets)
    temperature = temperature_of(name, temperature, hidden)
    same_device(name, hidden=hidden, temperature=temperature)
    one_or_all(name, temperature, hidden.shape[0])
    kind, num_kept = _kind_to_keep(name, head, return_entropy, memory_budget)
    logprobs, entropy, highest, log_sum, _, top1 = _op(*head, targets, temperature, kind, num_kept, return_top1)
    more = [entropy] if return_entropy else []
    if return_logsumexp:
        more.append(logsumexp_of(head.temperatures(temperature), highest, log_sum))
    if return_top1:
        more.append(top1)
    return (logprobs, *more) if more else logprobs
