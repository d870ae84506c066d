"""Advantages without a value model: the scores of the responses to one prompt against each other."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import WIDE, address, cu_seqlens_of, dtype_in, dtype_name, has_shape, same_device, widen
from fastrlhf.ops._launch import if_built, launch
from fastrlhf.ops._registry import op

KINDS = {"grpo": 1, "dr_grpo": 2, "rloo": 3}
ROUNDINGS = 8  # of the mean, relative to which a deviation counts as 0; the kernels know the number, too


def is_level(deviation: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether scores of this deviation and mean differ by the rounding of their dtype alone."""
    return deviation <= ROUNDINGS * torch.finfo(dtype).eps * mean.abs()


def group_advantages_ref(scores: Tensor, cu_groups: Tensor, kind: int, eps: float) -> Tensor:
    advantages = torch.zeros_like(scores)
    for start, end in itertools.pairwise(cu_groups.tolist()):
        group, others = scores[start:end], max(end - start - 1, 1)
        if end == start:
            continue
        mean = group.mean()
        centred = group - mean
        if kind == KINDS["grpo"]:
            deviation = (centred.square().sum() / others).sqrt()
            centred = centred * torch.where(is_level(deviation, mean, scores.dtype), 0, 1 / (deviation + eps))
        elif kind == KINDS["rloo"]:
            centred = centred * ((end - start) / others)
        advantages[start:end] = centred
    return advantages


def _check(scores: Tensor, cu_groups: Tensor, *_: Any) -> None:
    same_device("group_advantages", scores=scores, cu_groups=cu_groups)
    dtype_in("group_advantages", "scores", scores, WIDE)
    has_shape("group_advantages", "scores", scores, (None,), "(N,)")
    cu_seqlens_of("group_advantages", "cu_groups", cu_groups, scores.shape[0])


def _fake(scores: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _cpu_forward(scores: Tensor, cu_groups: Tensor, kind: int, eps: float) -> Tensor:
    scores, cu_groups = scores.contiguous(), cu_groups.contiguous()
    advantages = torch.empty_like(scores)
    kernel = getattr(_cpu, f"group_advantages_{dtype_name(scores)}")
    addresses = scores.data_ptr(), cu_groups.data_ptr(), advantages.data_ptr()
    kernel(*addresses, cu_groups.shape[0] - 1, kind, eps, torch.get_num_threads())
    return advantages


def _cuda_forward(scores: Tensor, cu_groups: Tensor, kind: int, eps: float) -> Tensor:
    scores, cu_groups = scores.contiguous(), cu_groups.contiguous()
    advantages = torch.empty_like(scores)
    addresses, sizes = map(address, (scores, cu_groups, advantages)), (scores.shape[0], cu_groups.shape[0] - 1)
    launch(f"group_advantages_{dtype_name(scores)}", scores, *addresses, *sizes, kind, eps)
    return advantages


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for lengths in [(), (1,), (4, 0, 1, 2, 9), (8,) * 16, (100, 2, 37)]:
        cu_groups = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        scores = torch.randn(sum(lengths), generator=generator).to(device, dtype)
        for kind in KINDS.values():
            yield scores, cu_groups, kind, 1e-6
    yield torch.ones_like(scores), cu_groups, 1, 1e-6


_op = op(
    "group_advantages(Tensor scores, Tensor cu_groups, int kind, float eps) -> Tensor",
    ref=group_advantages_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=if_built(_cuda_forward),
    check=_check,
    samples=samples,
)


def group_advantages(scores: Tensor, cu_groups: Tensor, *, kind: str = "grpo", eps: float = 1e-6) -> Tensor:
    """Returns the advantage of each response over the others to the same prompt.

    grpo: (s - mean) / (std + eps), std that of a sample: squares divided by n - 1;  dr_grpo: s - mean;
    rloo: s - mean of the n - 1 others = n / (n - 1) (s - mean).

    scores: (N,) float32|float64, score of each response; half precision becomes float32
    cu_groups: (G + 1,) int32, group g is responses cu_groups[g] to cu_groups[g + 1]; may be empty
    kind: "grpo", "dr_grpo" or "rloo"
    eps: added to the standard deviation, for grpo alone

    Equal scores give exactly 0, and so does a group of one, by every kind: there is nothing to compare it with. grpo
    also takes scores for equal if std is at most 8 roundings of the mean (8 * 2^-23 |mean| in float32): to divide by
    such a std would turn rounding errors into advantages. The other kinds do not divide. The result is one number a
    response; give it to each of its tokens (torch.repeat_interleave by response lengths).
    Computed in float64. Not differentiable. NaN in, NaN out for its group.
    Raises: ValueError for shapes, devices, cu_groups or options that do not fit, TypeError for dtypes.
    Source: Shao et al., arXiv 2402.03300 (grpo); Liu et al., arXiv 2503.20783 (dr_grpo); Ahmadian et al., arXiv
    2402.14740 (rloo).
    """
    scores = widen(scores)
    if kind not in KINDS:
        raise ValueError(f"group_advantages: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not eps > 0:
        raise ValueError(f"group_advantages: eps must be positive, got {eps}")
    return _op(scores, cu_groups, KINDS[kind], eps)
