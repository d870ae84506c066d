"""The losses of a reward model on rankings of several responses to a prompt."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import (
    WIDE,
    address,
    contiguous,
    cu_seqlens_of,
    denominator_of,
    dtype_in,
    dtype_name,
    has_shape,
    rows_of,
    same_device,
    same_shape,
    widen,
)
from fastrlhf.ops._launch import if_built, launch
from fastrlhf.ops._loss import keep_gradients, named, scale_gradients
from fastrlhf.ops._registry import op

KINDS = ("plackett_luce", "pairwise")
STATS = ("accuracy", "margin")
Outputs = tuple[Tensor, Tensor, Tensor]


def _plackett_luce(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of one group, from the table of who is up against whom."""
    rivals = scores.expand(len(scores), -1).masked_fill(ranks < ranks[:, None], -torch.inf)
    with torch.no_grad():
        grad = rivals.softmax(-1).sum(0) - 1
    return (rivals.logsumexp(-1) - scores).sum(), grad


def _pairwise(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(len(scores), len(scores), 1, device=scores.device)
    h, wins = scores[first] - scores[second], torch.where(ranks[first] == ranks[second], 0.5, 1.0).to(scores.dtype)
    loss = -(wins * F.logsigmoid(h) + (1 - wins) * F.logsigmoid(-h)).mean()
    with torch.no_grad():
        slope = ((1 - wins) * h.sigmoid() - wins * (-h).sigmoid()) / len(h)
        table = scores.new_zeros(len(scores), len(scores))
        table[first, second] = slope
    return loss, table.sum(1) - table.sum(0)


def _statistics(scores: Tensor, ranks: Tensor) -> Tensor:
    first, second = torch.triu_indices(len(scores), len(scores), 1, device=scores.device)
    margin = torch.where(ranks[first] == ranks[second], 0, 1) * (scores[first] - scores[second])
    return torch.stack([torch.where(margin.isnan(), margin, 0.5 * margin.sign() + 0.5).mean(), margin.mean()])


def ranking_loss_ref(
    scores: Tensor, cu_groups: Tensor, rows: Tensor | None, ties: Tensor | None, kind: str, denominator: float | None
) -> Outputs:
    if rows is not None:
        loss, stats, grad = ranking_loss_ref(scores[rows], cu_groups, None, ties, kind, denominator)
        return loss, stats, scores.new_zeros(scores.shape).index_copy(0, rows, grad.detach())
    bounds = list(itertools.pairwise(cu_groups.tolist()))
    count = max(sum(end - start > 1 for start, end in bounds), 1) if denominator is None else denominator
    new_rank = torch.ones_like(scores, dtype=torch.bool) if ties is None else ~ties
    loss, stats, grad = scores[:0].sum(), scores.new_zeros(len(STATS)), torch.zeros_like(scores)
    for start, end in bounds:
        if end - start > 1:
            group, ranks = scores[start:end], new_rank[start:end].clone()
            ranks[0] = True
            ranks = ranks.cumsum(0)
            group_loss, grad[start:end] = (_pairwise if kind == "pairwise" else _plackett_luce)(group, ranks)
            loss, stats = loss + group_loss, stats + _statistics(group.detach(), ranks)
    return loss / count, stats / count, grad.contiguous() / count


def _check(scores: Tensor, cu_groups: Tensor, rows: Tensor | None, ties: Tensor | None, *_: Any) -> None:
    same_device("ranking_loss", scores=scores, cu_groups=cu_groups, rows=rows, ties=ties)
    dtype_in("ranking_loss", "scores", scores, WIDE)
    has_shape("ranking_loss", "scores", scores, (None,), "(N,)")
    if rows is not None:
        rows_of("ranking_loss", "rows", rows, scores.shape[0])
    responses = {"scores": scores} if rows is None else {"rows": rows}
    cu_seqlens_of("ranking_loss", "cu_groups", cu_groups, _num_responses(scores, rows))
    if ties is not None:
        dtype_in("ranking_loss", "ties", ties, (torch.bool,))
        same_shape("ranking_loss", **responses, ties=ties)


def _num_responses(scores: Tensor, rows: Tensor | None) -> int:
    return (scores if rows is None else rows).shape[0]


def _fake(scores: Tensor, cu_groups: Tensor, rows: Tensor | None, *_: Any) -> Outputs:
    # the kernels write the gradients of the rows alone
    grad = scores.new_empty(scores.shape) if rows is None else scores.new_zeros(scores.shape)
    return scores.new_empty(()), scores.new_empty(len(STATS)), grad


def _addresses(scores: Tensor, *others: Tensor | None) -> tuple[list[int], Outputs, list[Any]]:
    """The addresses that a kernel takes, its outputs, and what must stay alive until it is started."""
    inputs = contiguous(scores, *others)
    outputs = _fake(scores, *others)  # type: ignore[arg-type]
    scratch = scores.new_empty(2 * _num_responses(scores, others[1]), dtype=torch.float64)
    kept = [*inputs, *outputs, scratch]
    return [address(x) for x in kept], outputs, kept


def _cpu_forward(
    scores: Tensor, cu_groups: Tensor, rows: Tensor | None, ties: Tensor | None, kind: str, denominator: float | None
) -> Outputs:
    addresses, outputs, _kept = _addresses(scores, cu_groups, rows, ties)
    kernel = getattr(_cpu, f"ranking_loss_{dtype_name(scores)}")
    kernel(*addresses, cu_groups.shape[0] - 1, KINDS.index(kind), denominator or 0.0, torch.get_num_threads())
    return outputs


def _cuda_forward(
    scores: Tensor, cu_groups: Tensor, rows: Tensor | None, ties: Tensor | None, kind: str, denominator: float | None
) -> Outputs:
    addresses, outputs, _kept = _addresses(scores, cu_groups, rows, ties)
    sizes = scores.shape[0], _num_responses(scores, rows), cu_groups.shape[0] - 1
    launch(f"ranking_loss_{dtype_name(scores)}", scores, *addresses, *sizes, KINDS.index(kind), denominator or 0.0)
    return outputs


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for lengths in [(), (1,), (2,), (4, 0, 1, 9), (4,) * 16, (40, 3)]:
        cu_groups = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        scores = torch.randn(sum(lengths), generator=generator).to(device, dtype)
        ties = (torch.rand(sum(lengths), generator=generator) < 0.3).to(device)
        for kind in KINDS:
            yield scores, cu_groups, None, None, kind, None
            yield scores, cu_groups, None, ties, kind, 7.0
            rows = torch.randperm(3 * sum(lengths), generator=generator)[: sum(lengths)].to(device)
            yield scores.repeat(3), cu_groups, rows, ties, kind, None
    for kind in KINDS:
        yield 100 * scores, cu_groups, None, ties, kind, None


_op = op(
    "ranking_loss(Tensor scores, Tensor cu_groups, Tensor? rows, Tensor? ties, str kind, float? denominator)"
    " -> (Tensor, Tensor, Tensor)",
    ref=ranking_loss_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=if_built(_cuda_forward),
    check=_check,
    samples=samples,
    grads=("scores",),
    setup_context=keep_gradients,
    backward=scale_gradients,
)


def ranking_loss(
    scores: Tensor,
    cu_groups: Tensor,
    *,
    kind: str = "plackett_luce",
    ties: Tensor | None = None,
    rows: Tensor | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss, stats) of a reward model on groups of responses, each in rank order, best first.

    "plackett_luce": loss = sum_n sum_{i in n} (log sum_{j in n, j not better than i} exp(s_j) - s_i) / denominator,
    which is minus log of the probability of drawing the ranking from the best to the worst.
    "pairwise": loss = sum_n sum_{i before j in n} -log sigmoid(s_i - s_j) / C(K_n, 2) / denominator, all pairs of a
    group of K_n, which weighs as one.
    With groups of two both are `pairwise_reward_loss`.

    scores: (N,) float32|float64, s; half precision becomes float32
    cu_groups: (G + 1,) int32, group n is scores[cu_groups[n]:cu_groups[n + 1]]; one of fewer than two adds nothing
    kind: "plackett_luce" or "pairwise"
    ties: (N,) bool, True where a response ranks the same as the one before it in its group. In "plackett_luce" the
        members of a tie each compete with all of it; in "pairwise" two of them are a pair with target 1/2
    rows: (N,) int64, each row at most once: `scores` may then be longer, say a score a token, and s is scores[rows],
        say those at last tokens
    denominator: the number of groups of the whole optimizer step, so that the losses and stats of micro-batches add up
        to those of the whole; without it the number of groups of two and more

    stats, detached, means over the pairs of a group, summed over groups / denominator: accuracy (s_i > s_j; equal
    scores or ranks count 0.5) and margin (s_i - s_j; 0 for equal ranks). Without a group of two loss and stats are 0.

    Only `scores` gets a gradient. It is stable for any finite scores. NaN in, NaN out.
    Raises: ValueError for shapes, devices, cu_groups, rows that are not there or there twice, kind or denominator,
    TypeError for dtypes.
    Source: Plackett, J. R. Stat. Soc. C 24 (1975); ties: Breslow, Biometrics 30 (1974); pairwise: Ouyang et al., arXiv
    2203.02155, equation 1.
    """
    scores = widen(scores)
    denominator_of("ranking_loss", denominator)
    if kind not in KINDS:
        raise ValueError(f"ranking_loss: kind must be 'plackett_luce' or 'pairwise', got {kind!r}")
    loss, stats, _ = _op(scores, cu_groups, rows, ties, kind, denominator)
    return loss, named(STATS, stats)
