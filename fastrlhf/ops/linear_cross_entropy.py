"""Cross-entropy under a linear head, its gradient made while the logits of a chunk exist."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf.ops._check import denominator_of
from fastrlhf.ops._linear import Gradients, Head, check_head, check_options, even_cuts, gathered, wanted_gradients
from fastrlhf.ops._linear_loss import (
    gradients_ref,
    kept_rows,
    loss_in_chunks,
    save_gradients,
    scaled_gradients,
)
from fastrlhf.ops._registry import leaf, op
from fastrlhf.ops.linear_token_logprobs import linear_token_logprobs_ref
from fastrlhf.ops.linear_token_logprobs import samples as linear_samples
from fastrlhf.ops.token_logprobs import computed_in


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    denominator: float | None,
    logit_scale: float,
    logit_softcap: float | None,
    chunk_size: int,
    batch_invariant: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        one = hidden.new_ones(1, dtype=computed_in(hidden))
        kept = kept_rows(mask, hidden)
        logprobs, *_ = linear_token_logprobs_ref(
            hidden[kept], weight, targets[kept], bias, one, logit_scale, logit_softcap
        )
        return -logprobs.sum() / (denominator or max(1, kept.shape[0]))

    return loss_of(hidden, weight, bias), *gradients_ref(loss_of, hidden, weight, bias, wanted)


def _fake(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    loss = hidden.new_empty((), dtype=computed_in(hidden))
    return loss, *Gradients.zeros(hidden, weight, args[-1], computed_in(hidden))


def _forward_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    denominator: float | None,
    logit_scale: float,
    logit_softcap: float | None,
    chunk_size: int,
    batch_invariant: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    kept = kept_rows(mask, hidden)
    scale = 1 / (denominator or max(1, kept.shape[0]))
    one = hidden.new_ones(1, dtype=computed_in(hidden))
    logprobs, _, grads = loss_in_chunks(
        Head.of(weight, bias, logit_scale, logit_softcap, chunk_size, batch_invariant),
        hidden,
        targets,
        one,
        kept,
        wanted,
        even_cuts(0, kept.shape[0], chunk_size),
        chunk_size,
        lambda rows, logprobs, entropy: [torch.full_like(logprobs, -scale), None],
    )
    return -scale * logprobs.sum(), *grads


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    hidden, weight, bias = scaled_gradients(ctx, grad_loss, [ctx.needs_input_grad[i] for i in (0, 1, 3)])
    return hidden, weight, None, bias, *(None,) * 7


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for hidden, weight, targets, bias, _, *options, _ in linear_samples(device, dtype):
        wanted = [True, True, bias is not None]
        mask = (torch.rand(targets.shape, generator=generator) < 0.6).to(device)
        yield hidden, weight, targets, bias, None, None, *options, wanted
        yield hidden, weight, targets, bias, mask, 7.0, *options, wanted
    yield hidden, weight, targets, bias, torch.zeros_like(mask), None, *options, wanted


_forward = leaf(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? mask, float? denominator,"
    " float logit_scale, float? logit_softcap, int chunk_size, bool batch_invariant, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    ref=_forward_chunks,
    fake=_fake,
    cpu=_forward_chunks,  # native in that the logits of a chunk go through the kernels of token_logprobs
)
_op = op(
    _forward,
    reference=linear_cross_entropy_ref,
    samples=samples,
    grads=("hidden", "weight", "bias"),
    setup_context=save_gradients,
    backward=_backward,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
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
    weight, bias = gathered(weight), None if bias is None else gathered(bias)
    check_head(name, hidden, weight, targets, bias, mask)
    denominator_of(name, denominator)
    check_options(name, logit_scale, logit_softcap, chunk_size, batch_invariant)
    wanted = wanted_gradients(hidden, weight, bias)
    options = denominator, logit_scale, logit_softcap, chunk_size, batch_invariant
    loss, *_ = _op(hidden, weight, targets, bias, mask, *options, wanted)
    return loss
