"""The Bradley-Terry loss of a reward model."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import (
    WIDE,
    address,
    alike,
    contiguous,
    denominator_of,
    dtype_in,
    dtype_name,
    has_shape,
    readable,
    rows_of,
    same_device,
    same_shape,
    widen,
)
from fastrlhf.ops._launch import if_built, launch
from fastrlhf.ops._loss import keep_gradients, named, scale_gradients
from fastrlhf.ops._registry import op

STATS = ("accuracy", "margin", "chosen", "rejected")


def pairwise_reward_loss_ref(
    chosen: Tensor,
    rejected: Tensor,
    chosen_rows: Tensor | None,
    rejected_rows: Tensor | None,
    margin: Tensor | None,
    targets: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    center_coef: float,
    denominator: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sides = (chosen, chosen_rows), (rejected, rejected_rows)
    chosen, rejected = (x.contiguous() if rows is None else x[rows] for x, rows in sides)  # sums go by memory order
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
        grads = [weights * (pull + slope) / count, weights * (pull - slope) / count]
        for i, (x, rows) in enumerate(sides):
            if rows is not None:
                grads[i] = x.new_zeros(x.shape).index_copy(0, rows, grads[i])
    return loss, stats, grads[0], grads[1]


def _check(
    chosen: Tensor,
    rejected: Tensor,
    chosen_rows: Tensor | None,
    rejected_rows: Tensor | None,
    margin: Tensor | None,
    targets: Tensor | None,
    weights: Tensor | None,
    *_: Any,
) -> None:
    name, options = "pairwise_reward_loss", {"margin": margin, "targets": targets, "weights": weights}
    has_shape(name, "chosen", chosen, (None,), "(N,)")
    if chosen_rows is None and rejected_rows is None:
        given = {key: tensor for key, tensor in options.items() if tensor is not None}
        return alike(name, WIDE, {"chosen": chosen, "rejected": rejected, **given})
    rows = {"chosen_rows": chosen_rows, "rejected_rows": rejected_rows}
    same_device(name, chosen=chosen, rejected=rejected, **rows, **options)
    dtype_in(name, "chosen", chosen, WIDE)
    for key, tensor in {"rejected": rejected, **options}.items():
        if tensor is not None:
            dtype_in(name, key, tensor, (chosen.dtype,))
    pairs = {}  # what has one element a pair
    for key, scores in {"chosen": chosen, "rejected": rejected}.items():
        has_shape(name, key, scores, (None,), "(N,)")
        side = rows[f"{key}_rows"]
        if side is not None:
            rows_of(name, f"{key}_rows", side, scores.shape[0])
        pairs.update({key: scores} if side is None else {f"{key}_rows": side})
    first = next(iter(pairs))
    for key, tensor in {**pairs, **options}.items():
        same_shape(name, **{first: pairs[first], key: tensor})


Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _fake(
    chosen: Tensor, rejected: Tensor, chosen_rows: Tensor | None, rejected_rows: Tensor | None, *_: Any
) -> Outputs:
    # the kernels write the gradients of the rows alone
    grads = [
        scores.new_empty(scores.shape[0]) if rows is None else scores.new_zeros(scores.shape[0])
        for scores, rows in ((chosen, chosen_rows), (rejected, rejected_rows))
    ]
    return chosen.new_empty(()), chosen.new_empty(len(STATS)), grads[0], grads[1]


def _num_pairs(chosen: Tensor, chosen_rows: Tensor | None) -> int:
    return (chosen if chosen_rows is None else chosen_rows).shape[0]


def _cpu_forward(*args: Any) -> Outputs:
    *tensors, label_smoothing, center_coef, denominator = args
    inputs, outputs = contiguous(*tensors), _fake(*tensors)
    options = label_smoothing, center_coef, denominator or 0.0, torch.get_num_threads()
    addresses, num_pairs = map(address, (*inputs, *outputs)), _num_pairs(tensors[0], tensors[2])
    getattr(_cpu, f"pairwise_reward_loss_{dtype_name(outputs[0])}")(*addresses, num_pairs, *options)
    return outputs


def _cuda_forward(*args: Any) -> Outputs:
    *tensors, label_smoothing, center_coef, denominator = args
    inputs, outputs = contiguous(*tensors), _fake(*tensors)
    sizes = tensors[0].shape[0], tensors[1].shape[0], _num_pairs(tensors[0], tensors[2])
    options = *map(address, (*inputs, *outputs)), *sizes, label_smoothing, center_coef, denominator or 0.0
    launch(f"pairwise_reward_loss_{dtype_name(outputs[0])}", outputs[0], *options)
    return outputs


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 17, 300):
        chosen, rejected = (2 * torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
        margin, targets, weights = (torch.rand(size, generator=generator).to(device, dtype) for _ in range(3))
        yield chosen, rejected, None, None, None, None, None, 0.0, 0.0, None
        yield chosen, rejected, None, None, margin, targets, weights, 0.1, 0.01, None
        yield chosen, rejected, None, None, margin, None, None, 0.0, 0.01, 77.0
        rows = [torch.randperm(size, generator=generator)[: size // 2].to(device) for _ in range(2)]
        half = [x[: size // 2] for x in (margin, targets, weights)]
        yield chosen, rejected, *rows, *half, 0.1, 0.01, None
    yield 50 * chosen, chosen * 50, None, None, None, None, weights, 0.0, 0.0, None


_op = op(
    "pairwise_reward_loss(Tensor chosen, Tensor rejected, Tensor? chosen_rows, Tensor? rejected_rows,"
    " Tensor? margin, Tensor? targets, Tensor? weights, float label_smoothing, float center_coef, float? denominator)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    ref=pairwise_reward_loss_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=if_built(_cuda_forward),
    check=_check,
    samples=samples,
    grads=("chosen", "rejected"),
    setup_context=keep_gradients,
    backward=scale_gradients,
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
    chosen_rows: Tensor | None = None,
    rejected_rows: Tensor | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss, stats) of a reward model on pairs of responses.

    loss = sum w (-p log sigmoid(h) - (1 - p) log sigmoid(-h) + center_coef (c + r)^2) / denominator, with scores c and
    r, h = c - r - margin and p = (1 - label_smoothing) targets + label_smoothing (1 - targets).

    chosen, rejected: (N,) float32|float64, scores of the preferred and of the other response; half precision becomes
        float32
    chosen_rows, rejected_rows: (N,) int64, each row at most once: `chosen` may then be longer, say a score a token, and
        pair i is of chosen[chosen_rows[i]], say at the last token; likewise `rejected`, which may be the same tensor
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
    Raises: ValueError for shapes, devices, label_smoothing, targets outside [0, 1], rows that are not there or there
    twice, or denominator, TypeError for dtypes.
    Source: Ouyang et al., arXiv 2203.02155, equation 1; margin: Touvron et al., arXiv 2307.09288, equation 2; centring:
    Eisenstein et al., arXiv 2312.09244.
    """
    chosen, rejected = widen(chosen), widen(rejected)
    margin, weights, targets = (None if x is None else widen(x) for x in (margin, weights, targets))
    denominator_of("pairwise_reward_loss", denominator)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"pairwise_reward_loss: label_smoothing must be in [0, 1], got {label_smoothing}")
    if targets is not None and readable(targets) and bool(((targets < 0) | (targets > 1)).any()):
        low, high = targets.min().item(), targets.max().item()
        raise ValueError(f"pairwise_reward_loss: targets must be in [0, 1], got values from {low} to {high}")
    tensors = chosen, rejected, chosen_rows, rejected_rows, margin, targets, weights
    loss, stats, *_ = _op(*tensors, label_smoothing, center_coef, denominator)
    return loss, named(STATS, stats)
