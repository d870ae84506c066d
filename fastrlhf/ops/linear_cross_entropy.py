"""Cross-entropy under a linear head, its gradient made while the logits of a chunk exist."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf.ops._check import computed_in, denominator_of
from fastrlhf.ops._linear import GRADIENTS, SCHEMA, Gradients, Head, even_cuts, if_fused
from fastrlhf.ops._linear_backward import LOGITS
from fastrlhf.ops._linear_inputs import check_targets, head_of, wanted_gradients
from fastrlhf.ops._linear_inputs import samples as head_samples
from fastrlhf.ops._linear_loss import fake, gradients_ref, kept_rows, loss_in_chunks, save_gradients, scale_gradients
from fastrlhf.ops._registry import op
from fastrlhf.ops.linear_token_logprobs import linear_token_logprobs_ref


def linear_cross_entropy_ref(*args: Any) -> tuple[Tensor, ...]:
    head, (targets, mask, denominator, wanted) = Head.split(args)
    kept = kept_rows(mask, targets)

    def loss_of(head: Head) -> Tensor:
        one = head.hidden.new_ones(1, dtype=computed_in(head.hidden))
        logprobs, *_ = linear_token_logprobs_ref(*head.rows(kept), targets[kept], one, LOGITS, 0)
        return -logprobs.sum() / (denominator or max(1, kept.shape[0]))

    return loss_of(head), *gradients_ref(loss_of, head, wanted)


def _forward_chunks(*args: Any) -> tuple[Tensor, ...]:
    head, (targets, mask, denominator, wanted) = Head.split(args)
    kept = kept_rows(mask, targets)
    scale = 1 / (denominator or max(1, kept.shape[0]))

    def upstream(rows: slice, logprobs: Tensor, entropy: Tensor) -> list[Tensor | None]:
        return [torch.full_like(logprobs, -scale), None]

    one = head.hidden.new_ones(1, dtype=computed_in(head.hidden))
    cuts = even_cuts(0, kept.shape[0], head.chunk_size)
    logprobs, _, grads = loss_in_chunks(head, targets, one, kept, wanted, cuts, upstream)
    return -scale * logprobs.sum(), *grads


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for head, targets, _ in head_samples(device, dtype):
        wanted = [t is not None for t in head.tensors]
        mask = (torch.rand(targets.shape, generator=generator) < 0.6).to(device)
        yield *head, targets, None, None, wanted
        yield *head, targets, mask, 7.0, wanted
    yield *head, targets, torch.zeros_like(mask), None, wanted


_op = op(
    f"linear_cross_entropy({SCHEMA}, Tensor targets, Tensor? mask, float? denominator, bool[] wanted)"
    f" -> (Tensor, {GRADIENTS})",
    ref=_forward_chunks,
    fake=fake(num_stats=0),
    cpu=_forward_chunks,  # native in that the logits of a chunk go through the kernels of token_logprobs
    cuda=if_fused(_forward_chunks),
    reference=linear_cross_entropy_ref,
    samples=samples,
    grads=Gradients._fields,
    setup_context=save_gradients,
    backward=scale_gradients,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    mask: Tensor | None = None,
    denominator: float | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int = 512,
    batch_invariant: bool = False,
) -> Tensor:
    """Returns the cross-entropy of logits = hidden weight^T + bias, made a chunk of rows at a time.

    loss = -sum over the mask of log softmax(logits[t])[targets[t]] / denominator. With logit_scale the logits are
    multiplied by it; then with logit_softcap they are cap tanh(logits / cap).

    hidden: (T, D) float32|float64|bfloat16|float16, rows that predict the targets
    weight: (V, D) like hidden, as in `linear_token_logprobs`
    targets: (T,) int64, in [0, V) where the mask is True; elsewhere than on the CPU a target out of range gives NaN
    bias: (V,) like hidden
    lora: (a, b, scale), a low-rank change of the weight, as in `linear_token_logprobs`
    mask: (T,) bool, True where a row counts; other rows are not computed and get gradient 0
    denominator: the number of rows of the whole optimizer step, so that the losses of micro-batches add up to that of
        the whole; without it the number of rows that count here. With nothing to count the loss is 0
    chunk_size: rows whose logits exist at a time, in float32: chunk_size x V x 4 bytes, twice with a soft cap
    batch_invariant: makes what a row gets (its gradient in hidden too) independent of the other rows, bit for bit; see
        `linear_token_logprobs`
    loss: () float32 whatever the inputs (float64 for float64)

    The gradients are made in the forward, in float32 whatever the inputs, if grad mode is on and an input needs one:
    three matrix products, and one less for a frozen head or frozen hidden states. The backward scales them, in place
    unless the graph is retained, then rounds once. A second derivative raises. Deterministic. NaN in, NaN out.
    Raises: ValueError for shapes, devices, targets or options that do not fit, TypeError for dtypes.
    Source: the gradient made in the forward is that of Liger Kernel, arXiv 2410.10989.
    """
    name = "linear_cross_entropy"
    head = head_of(name, hidden, weight, bias, lora, logit_scale, logit_softcap, chunk_size, batch_invariant)
    check_targets(name, head, targets, mask)
    denominator_of(name, denominator)
    loss, *_ = _op(*head, targets, mask, denominator, wanted_gradients(*head.tensors))
    return loss
