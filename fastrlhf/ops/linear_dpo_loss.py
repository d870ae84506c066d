"""DPO's loss under a linear head, its gradient made while the logits of a pair exist."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf.ops._check import computed_in, cu_seqlens_of, denominator_of, dtype_in, has_shape, same_device, widen
from fastrlhf.ops._linear import GRADIENTS, SCHEMA, Gradients, Head, if_fused
from fastrlhf.ops._linear_backward import LOGITS
from fastrlhf.ops._linear_inputs import check_targets, head_of, wanted_gradients
from fastrlhf.ops._linear_inputs import samples as head_samples
from fastrlhf.ops._linear_loss import fake, gradients_ref, kept_rows, loss_in_chunks, save_gradients, scale_gradients
from fastrlhf.ops._registry import op
from fastrlhf.ops.linear_token_logprobs import linear_token_logprobs_ref

STATS = ("accuracy", "margin", "chosen", "rejected", "chosen_logprobs", "rejected_logprobs")


def linear_dpo_loss_ref(*args: Any) -> tuple[Tensor, ...]:
    head, (targets, cu_seqlens, ref_logprobs, mask, beta, label_smoothing, denominator, wanted) = Head.split(args)
    kept, num_sequences = kept_rows(mask, targets), cu_seqlens.shape[0] - 1
    owner = torch.repeat_interleave(cu_seqlens.diff().long(), output_size=targets.shape[0])[kept]
    count = denominator or max(1, num_sequences // 2)

    def terms(head: Head) -> tuple[Tensor, Tensor]:
        one = head.hidden.new_ones(1, dtype=computed_in(head.hidden))
        logprobs, *_ = linear_token_logprobs_ref(*head.rows(kept), targets[kept], one, LOGITS, 0)
        log_ratios = logprobs - ref_logprobs[kept]
        sums, total = (x.new_zeros(num_sequences).index_add(0, owner, x) for x in (logprobs, log_ratios))
        chosen, rejected = beta * total[::2], beta * total[1::2]
        h = chosen - rejected
        loss = -((1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)).sum() / count
        accuracy = torch.where(h.isnan(), h, (h.sign() + 1) / 2)
        return loss, torch.stack([x.sum() / count for x in (accuracy, h, chosen, rejected, sums[::2], sums[1::2])])

    loss, stats = terms(head)
    return loss, stats.detach(), *gradients_ref(lambda head: terms(head)[0], head, wanted)


def _groups_of_pairs(bounds: list[int], chunk_size: int) -> tuple[list[slice], list[slice]]:
    """(rows, pairs) in slices of whole pairs of at most chunk_size rows; a pair that is longer is alone in its own.

    bounds: where in the rows the pairs begin and end"""
    rows, pairs, first = [], [], 0
    for pair, (begin, end) in enumerate(pairwise(bounds)):
        if end - bounds[first] > chunk_size and begin > bounds[first]:
            rows.append(slice(bounds[first], begin))
            pairs.append(slice(first, pair))
            first = pair
    if bounds[-1] > bounds[first]:
        rows.append(slice(bounds[first], bounds[-1]))
        pairs.append(slice(first, len(bounds) - 1))
    return rows, pairs


def _forward_chunks(*args: Any) -> tuple[Tensor, ...]:
    head, (targets, cu_seqlens, ref_logprobs, mask, beta, label_smoothing, denominator, wanted) = Head.split(args)
    kept = kept_rows(mask, targets)
    bounds = cu_seqlens.long() if mask is None else F.pad(mask.cumsum(0), (1, 0))[cu_seqlens.long()]
    lengths, ref = bounds.diff().view(-1, 2), ref_logprobs[kept]
    count = denominator or max(1, lengths.shape[0])
    groups, pairs = _groups_of_pairs(bounds[::2].tolist(), head.chunk_size)
    pairs_of = {rows.start: group for rows, group in zip(groups, pairs, strict=True)}

    def sums(x: Tensor, pairs: slice) -> Tensor:
        """The sums over the two sequences of these pairs, (N, 2), of x, which holds their rows."""
        return torch.segment_reduce(x, "sum", lengths=lengths[pairs].flatten(), axis=0, unsafe=True).view(-1, 2)

    def loss_of(logprobs: Tensor, ref: Tensor, pairs: slice) -> tuple[Tensor, ...]:
        """The loss of a reward model whose reward is beta log(policy / reference)."""
        chosen, rejected = (beta * sums(logprobs - ref, pairs)).unbind(1)
        none = (None,) * 5
        return torch.ops.fastrlhf.pairwise_reward_loss(chosen, rejected, *none, label_smoothing, 0.0, count)

    def upstream(rows: slice, logprobs: Tensor, entropy: Tensor) -> list[Tensor | None]:
        pairs = pairs_of[rows.start]
        *_, chosen, rejected = loss_of(logprobs, ref[rows], pairs)
        of_sequences = beta * torch.stack([chosen, rejected], 1).flatten()
        return [of_sequences.repeat_interleave(lengths[pairs].flatten()), None]

    one = head.hidden.new_ones(1, dtype=computed_in(head.hidden))
    logprobs, _, grads = loss_in_chunks(head, targets, one, kept, wanted, groups, upstream)
    loss, stats, *_ = loss_of(logprobs, ref, slice(None))
    return loss, torch.cat([stats, sums(logprobs, slice(None)).sum(0) / count]), *grads


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for head, targets, temperature in head_samples(device, dtype):
        wanted, num_rows = [t is not None for t in head.tensors], targets.shape[0]
        logprobs, *_ = linear_token_logprobs_ref(*head, targets, temperature, LOGITS, 0)
        ref = logprobs + 0.3 * torch.randn(num_rows, generator=generator).to(logprobs)
        mask = (torch.rand(num_rows, generator=generator) < 0.6).to(device)
        for ends in ([num_rows], [num_rows // 3, num_rows // 2, num_rows // 2]):  # the second: an empty sequence
            cu_seqlens = torch.tensor([0, *ends, num_rows], dtype=torch.int32, device=device)
            yield *head, targets, cu_seqlens, ref, None, 0.1, 0.0, None, wanted
            yield *head, targets, cu_seqlens, ref, mask, 0.5, 0.1, 3.0, wanted
        if num_rows == 0:
            yield *head, targets, cu_seqlens[:1], ref, None, 0.1, 0.0, None, wanted


_op = op(
    f"linear_dpo_loss({SCHEMA}, Tensor targets, Tensor cu_seqlens, Tensor ref_logprobs, Tensor? mask, float beta,"
    f" float label_smoothing, float? denominator, bool[] wanted) -> (Tensor, Tensor, {GRADIENTS})",
    ref=_forward_chunks,
    fake=fake(len(STATS)),
    cpu=_forward_chunks,  # native in that a chunk goes through the kernels of token_logprobs and pairwise_reward_loss
    cuda=if_fused(_forward_chunks),
    reference=linear_dpo_loss_ref,
    samples=samples,
    grads=Gradients._fields,
    setup_context=save_gradients,
    backward=scale_gradients,
)


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    ref_logprobs: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    mask: Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    denominator: float | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int = 512,
    batch_invariant: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss, stats) of DPO with logits = hidden weight^T + bias, made a chunk of rows at a time.

    loss = sum over pairs of -(1 - label_smoothing) log sigmoid(h) - label_smoothing log sigmoid(-h) / denominator, with
    h = r(chosen) - r(rejected) and r = beta times the sum over the mask in a sequence of logprobs - ref_logprobs,
    logprobs as of `linear_token_logprobs`.

    hidden: (T, D) float32|float64|bfloat16|float16, rows that predict the targets
    weight: (V, D) like hidden, as in `linear_token_logprobs`
    targets: (T,) int64, in [0, V) where the mask is True; elsewhere than on the CPU a target out of range gives NaN
    cu_seqlens: (2N + 1,) int32, the bounds of the sequences: the chosen and the rejected one of each pair in turn
    ref_logprobs: (T,) float32 (float64 for float64), under the reference; half precision becomes float32
    bias: (V,) like hidden
    lora: (a, b, scale), a low-rank change of the weight, as in `linear_token_logprobs`
    mask: (T,) bool, True where a row counts, say those of responses; other rows are not computed and get gradient 0
    label_smoothing: probability that a label is wrong, from 0 to 1
    denominator: the number of pairs of the whole optimizer step, so that the losses and stats of micro-batches add up
        to those of the whole; without it N
    logit_scale, logit_softcap, chunk_size, batch_invariant: as in `linear_token_logprobs`

    stats, detached, sums over pairs / denominator: accuracy (r of the chosen is the larger; a tie counts 0.5), margin
    (h), chosen and rejected (their r), chosen_logprobs and rejected_logprobs (their sums). Without a pair all are 0.

    Gradients are made as in `linear_cross_entropy`, in the forward, once the sums of a pair are known: in three matrix
    products where its rows fit in a chunk, else in four, as the logits are made again. NaN in, NaN out where the mask
    is True. Deterministic.
    Raises: ValueError for shapes, devices, targets, cu_seqlens or options that do not fit, TypeError for dtypes.
    Source: Rafailov et al., arXiv 2305.18290, equation 7; label_smoothing: Mitchell, "A note on DPO with noisy
    preferences", 2023.
    """
    name, num_rows = "linear_dpo_loss", targets.shape[:1]
    head = head_of(name, hidden, weight, bias, lora, logit_scale, logit_softcap, chunk_size, batch_invariant)
    check_targets(name, head, targets, mask)
    ref_logprobs = widen(ref_logprobs)
    same_device(name, hidden=hidden, cu_seqlens=cu_seqlens, ref_logprobs=ref_logprobs)
    dtype_in(name, "ref_logprobs", ref_logprobs, (computed_in(hidden),))
    has_shape(name, "ref_logprobs", ref_logprobs, num_rows, "(T,)")
    cu_seqlens_of(name, "cu_seqlens", cu_seqlens, targets.shape[0])
    if cu_seqlens.shape[0] % 2 == 0:
        raise ValueError(f"{name}: cu_seqlens must be (2N + 1,), got {tuple(cu_seqlens.shape)}")
    if not 0 < beta < math.inf:
        raise ValueError(f"{name}: beta must be above 0 and finite, got {beta}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing}")
    denominator_of(name, denominator)
    inputs = *head, targets, cu_seqlens, ref_logprobs, mask, beta, label_smoothing, denominator
    loss, stats, *_ = _op(*inputs, wanted_gradients(*head.tensors))
    return loss, dict(zip(STATS, stats.unbind(), strict=True))
