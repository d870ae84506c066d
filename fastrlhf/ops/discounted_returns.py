"""Discounted sums of the rewards that follow each token of a packed batch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import WIDE, address, cu_seqlens_of, dtype_in, dtype_name, has_shape, same_device, widen
from fastrlhf.ops._launch import if_built, launch
from fastrlhf.ops._registry import op


def discounted_returns_ref(rewards: Tensor, cu_seqlens: Tensor, gamma: float) -> Tensor:
    returns = rewards.clone()
    lengths, last = cu_seqlens.diff().long(), cu_seqlens[1:].long() - 1
    for back in range(1, int(lengths.max()) if len(lengths) else 0):
        t = last[lengths > back] - back
        returns[t] += gamma * returns[t + 1]
    return returns


def _check(rewards: Tensor, cu_seqlens: Tensor, *_: Any) -> None:
    same_device("discounted_returns", rewards=rewards, cu_seqlens=cu_seqlens)
    dtype_in("discounted_returns", "rewards", rewards, WIDE)
    has_shape("discounted_returns", "rewards", rewards, (None,), "(T,)")
    cu_seqlens_of("discounted_returns", "cu_seqlens", cu_seqlens, rewards.shape[0])


def _fake(rewards: Tensor, cu_seqlens: Tensor, gamma: float) -> Tensor:
    return torch.empty_like(rewards, memory_format=torch.contiguous_format)


def _cpu_forward(rewards: Tensor, cu_seqlens: Tensor, gamma: float) -> Tensor:
    rewards, cu_seqlens = rewards.contiguous(), cu_seqlens.contiguous()
    returns = torch.empty_like(rewards)
    kernel = getattr(_cpu, f"discounted_returns_{dtype_name(rewards)}")
    num, threads = cu_seqlens.shape[0] - 1, torch.get_num_threads()
    kernel(rewards.data_ptr(), cu_seqlens.data_ptr(), returns.data_ptr(), num, gamma, threads)
    return returns


def _cuda_forward(rewards: Tensor, cu_seqlens: Tensor, gamma: float) -> Tensor:
    rewards, cu_seqlens = rewards.contiguous(), cu_seqlens.contiguous()
    returns = torch.empty_like(rewards)
    addresses = map(address, (rewards, cu_seqlens, returns))
    launch(f"discounted_returns_{dtype_name(rewards)}", rewards, *addresses, len(rewards), len(cu_seqlens) - 1, gamma)
    return returns


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for lengths in [(), (1,), (3, 0, 1, 5), (64,) * 8, (300, 2, 41)]:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        rewards = torch.randn(sum(lengths), generator=generator).to(device, dtype)
        yield rewards, cu_seqlens, 1.0
        yield rewards, cu_seqlens, 0.97


_op = op(
    "discounted_returns(Tensor rewards, Tensor cu_seqlens, float gamma) -> Tensor",
    ref=discounted_returns_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=if_built(_cuda_forward),
    check=_check,
    samples=samples,
)


def discounted_returns(rewards: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Returns the discounted sum of the rewards from each token to the end of its segment.

    R_t = r_t + gamma R_next, and R = r at the last token of a segment: the advantages of REINFORCE without a baseline.

    rewards: (T,) float32|float64, reward of each token; half precision becomes float32
    cu_seqlens: (N + 1,) int32, segment n is tokens cu_seqlens[n] to cu_seqlens[n + 1]; may be empty
    gamma: discount, in [0, 1]

    The result is not differentiable. NaN in, NaN out (towards the start of the same segment).
    Raises: ValueError for shapes, devices, cu_seqlens or gamma that do not fit, TypeError for dtypes.
    Source: Sutton and Barto, "Reinforcement Learning" (2018), equation 3.9.
    """
    rewards = widen(rewards)
    if not 0 <= gamma <= 1:
        raise ValueError(f"discounted_returns: gamma must be in [0, 1], got {gamma}")
    return _op(rewards, cu_seqlens, gamma)
