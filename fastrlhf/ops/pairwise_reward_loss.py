"""The Bradley-Terry loss of a reward model."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import (
    address,
    denominator_of,
    dtype_in,
    dtype_name,
    has_shape,
    readable,
    same_device,
    same_shape,
    widen,
)
from fastrlhf.ops._registry import leaf, op

FLOATS = (torch.float32, torch.float64)
STATS = ("accuracy", "margin", "chosen", "rejected")


def pairwise_reward_loss_ref(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    targets: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    center_coef: float,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen, rejected = chosen.contiguous(), rejected.contiguous()  # sums go by the order in memory
    count = max(chosen.shape[0], 1) if denominator is None else denominator
    weights = torch.ones_like(chosen) if weights is None else weights
    targets = torch.ones_like(chosen) if targets is None else targets
    targets = (1 - label_smoothing) * targets + label_smoothing * (1 - targets)
    h = chosen - rejected - (0 if margin is None else margin)
    total = chosen + rejected
    entropy = -targets * F.logsigmoid(h) - (1 - targets) * F.logsigmoid(-h)
    loss = (weights * (entropy + center_coef * total.square())).sum() / count
    with torch.no_grad():
        difference = chosen - rejected
        accuracy = torch.where(difference.isnan(), difference, 0.5 * difference.sign() + 0.5)
        stats = torch.stack([accuracy.sum(), difference.sum(), chosen.sum(), rejected.sum()]) / count
        slope, pull = (1 - targets) * h.sigmoid() - targets * (-h).sigmoid(), 2 * center_coef * total
        grads = weights * (pull + slope) / count, weights * (pull - slope) / count
    return loss, stats, *grads


def _check(chosen: Tensor, rejected: Tensor, **optional: Tensor | None) -> None:
    name = "pairwise_reward_loss"
    same_device(name, chosen=chosen, rejected=rejected, **optional)
    dtype_in(name, "chosen", chosen, FLOATS)
    has_shape(name, "chosen", chosen, (None,), "(N,)")
    for key, tensor in {"rejected": rejected, **optional}.items():
        if tensor is not None:
            dtype_in(name, key, tensor, (chosen.dtype,))
            same_shape(name, **{"chosen": chosen, key: tensor})


def _fake(chosen: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = chosen.shape[0]
    return chosen.new_empty(()), chosen.new_empty(len(STATS)), chosen.new_empty(size), chosen.new_empty(size)


def _cpu_forward(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    targets: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    center_coef: float,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(chosen, rejected, margin=margin, targets=targets, weights=weights)
    chosen, rejected = chosen.contiguous(), rejected.contiguous()
    margin, targets, weights = (None if x is None else x.contiguous() for x in (margin, targets, weights))
    loss, stats, grad_chosen, grad_rejected = _fake(chosen)
    kernel = getattr(_cpu, f"pairwise_reward_loss_{dtype_name(chosen)}")
    kernel(
        chosen.data_ptr(),
        rejected.data_ptr(),
        address(margin),
        address(targets),
        address(weights),
        loss.data_ptr(),
        stats.data_ptr(),
        grad_chosen.data_ptr(),
        grad_rejected.data_ptr(),
        chosen.shape[0],
        label_smoothing,
        center_coef,
        denominator or 0.0,
    )
    return loss, stats, grad_chosen, grad_rejected


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, stats, grad_chosen, grad_rejected = output
    ctx.mark_non_differentiable(stats, grad_chosen, grad_rejected)
    ctx.save_for_backward(grad_chosen, grad_rejected)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    grad_chosen, grad_rejected = ctx.saved_tensors
    return grad_loss * grad_chosen, grad_loss * grad_rejected, None, None, None, None, None, None


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 17, 300):
        chosen, rejected = (2 * torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
        margin, targets, weights = (torch.rand(size, generator=generator).to(device, dtype) for _ in range(3))
        yield chosen, rejected, None, None, None, 0.0, 0.0, None
        yield chosen, rejected, margin, targets, weights, 0.1, 0.01, None
        yield chosen, rejected, margin, None, None, 0.0, 0.01, 77.0
    yield 50 * chosen, chosen * 50, None, None, weights, 0.0, 0.0, None


_forward = leaf(
    "pairwise_reward_loss(Tensor chosen, Tensor rejected, Tensor? margin, Tensor? targets, Tensor? weights,"
    " float label_smoothing, float center_coef, float? denominator) -> (Tensor, Tensor, Tensor, Tensor)",
    ref=pairwise_reward_loss_ref,
    fake=_fake,
    cpu=_cpu_forward,
)
_op = op(
    _forward,
    reference=pairwise_reward_loss_ref,
    samples=samples,
    grads=("chosen", "rejected"),
    setup_context=_setup_context,
    backward=_backward,
)


def pairwise_reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
    weights: Tensor | None = None,
    targets: Tensor | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss, stats) of a reward model on pairs of responses.

    loss = sum w (-p log sigmoid(h) - (1 - p) log sigmoid(-h) + center_coef (c + r)^2) / denominator, with scores c and
    r, h = c - r - margin and p = (1 - label_smoothing) targets + label_smoothing (1 - targets).

    chosen, rejected: (N,) float32|float64, scores of the preferred and of the other response; half precision becomes
        float32
    margin: (N,) like chosen, by how much c should exceed r
    label_smoothing: probability that a label is wrong
    center_coef: pulls c + r towards 0, as the loss does not fix the level of the scores
    weights: (N,) like chosen, w; 1 without it
    targets: (N,) like chosen, probability that `chosen` is the better one; 1 without it
    denominator: the number of pairs of the whole optimizer step, so that the losses and stats of micro-batches add up
        to those of the whole; without it N

    stats, detached, not weighted, sums / denominator: accuracy (c > r, a tie counts 0.5), margin (c - r), chosen (c),
    rejected (r). Without a pair loss and stats are 0.

    Only the scores get a gradient; the others must be detached. It is stable for any finite scores. NaN in, NaN out.
    Raises: ValueError for shapes, devices, label_smoothing, targets outside [0, 1] or denominator, TypeError for
    dtypes.
    Source: Ouyang et al., arXiv 2203.02155, equation 1; margin: Touvron et al., arXiv 2307.09288, equation 2; centring:
    Eisenstein et al., arXiv 2312.09244.
    """
    chosen, rejected = widen(chosen), widen(rejected)
    margin, weights, targets = (None if x is None else widen(x) for x in (margin, weights, targets))
    _check(chosen, rejected, margin=margin, targets=targets, weights=weights)
    denominator_of("pairwise_reward_loss", denominator)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"pairwise_reward_loss: label_smoothing must be in [0, 1], got {label_smoothing}")
    if targets is not None and readable(targets) and bool(((targets < 0) | (targets > 1)).any()):
        low, high = targets.min().item(), targets.max().item()
        raise ValueError(f"pairwise_reward_loss: targets must be in [0, 1], got values from {low} to {high}")
    loss, stats, *_ = _op(chosen, rejected, margin, targets, weights, label_smoothing, center_coef, denominator)
    return loss, dict(zip(STATS, stats.unbind(), strict=True))
