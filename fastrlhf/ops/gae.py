"""Generalised advantage estimation over a packed batch."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import address, cu_seqlens_of, dtype_in, dtype_name, has_shape, same_device, same_shape
from fastrlhf.ops._registry import leaf, op

FLOATS = (torch.float32, torch.float64)


def gae_ref(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    bounds = cu_seqlens.tolist()
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        next_advantage = rewards.new_zeros(())
        next_value = rewards.new_zeros(()) if bootstrap is None else bootstrap[n]
        for t in reversed(range(start, end)):
            if mask is None or bool(mask[t]):
                delta = rewards[t] + gamma * next_value - values[t]
                advantages[t] = next_advantage = delta + gamma * lam * next_advantage
                next_value = values[t]
                returns[t] = next_advantage + next_value
    return advantages, returns


def _check(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, mask: Tensor | None, bootstrap: Tensor | None) -> None:
    same_device("gae", rewards=rewards, values=values, cu_seqlens=cu_seqlens, mask=mask, bootstrap=bootstrap)
    dtype_in("gae", "rewards", rewards, FLOATS)
    dtype_in("gae", "values", values, (rewards.dtype,))
    has_shape("gae", "rewards", rewards, (None,), "(T,)")
    same_shape("gae", rewards=rewards, values=values)
    cu_seqlens_of("gae", "cu_seqlens", cu_seqlens, rewards.shape[0])
    if mask is not None:
        dtype_in("gae", "mask", mask, (torch.bool,))
        same_shape("gae", rewards=rewards, mask=mask)
    if bootstrap is not None:
        dtype_in("gae", "bootstrap", bootstrap, (rewards.dtype,))
        has_shape("gae", "bootstrap", bootstrap, (cu_seqlens.shape[0] - 1,), "(N,)")


def _fake(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rewards), torch.empty_like(rewards)


def _cpu_forward(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    _check(rewards, values, cu_seqlens, mask, bootstrap)
    rewards, values, cu_seqlens = rewards.contiguous(), values.contiguous(), cu_seqlens.contiguous()
    mask = None if mask is None else mask.contiguous()
    bootstrap = None if bootstrap is None else bootstrap.contiguous()
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    kernel = getattr(_cpu, f"gae_{dtype_name(rewards)}")
    kernel(
        rewards.data_ptr(),
        values.data_ptr(),
        cu_seqlens.data_ptr(),
        address(mask),
        address(bootstrap),
        advantages.data_ptr(),
        returns.data_ptr(),
        cu_seqlens.shape[0] - 1,
        gamma,
        lam,
        torch.get_num_threads(),
    )
    return advantages, returns


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for lengths in [(), (1,), (3, 0, 1, 5), (64,) * 8, (300, 2, 41)]:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        rewards, values = (torch.randn(sum(lengths), generator=generator).to(device, dtype) for _ in range(2))
        yield rewards, values, cu_seqlens, None, None, 0.99, 0.95
        mask = (torch.rand(sum(lengths), generator=generator) < 0.7).to(device)
        bootstrap = torch.randn(len(lengths), generator=generator).to(device, dtype)
        yield rewards, values, cu_seqlens, mask, bootstrap, 1.0, 0.9


_forward = leaf(
    "gae(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor? mask, Tensor? bootstrap, float gamma, float lam)"
    " -> (Tensor, Tensor)",
    ref=gae_ref,
    fake=_fake,
    cpu=_cpu_forward,
)
_op = op(_forward, reference=gae_ref, samples=samples)


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Returns (advantages, returns) of each segment of a packed batch.

    delta_t = r_t + gamma V_next - V_t;  A_t = delta_t + gamma lam A_next;  R_t = A_t + V_t, where next is the next
    token of the same segment whose mask is True. After the last one V_next is `bootstrap[n]` and A_next is 0.

    rewards: (T,) float32|float64, reward of each token
    values: (T,) like rewards, value of the state before each token
    cu_seqlens: (N + 1,) int32, segment n is tokens cu_seqlens[n] to cu_seqlens[n + 1]; may be empty
    mask: (T,) bool, True where a token counts; both outputs are exactly 0 elsewhere (values are carried through)
    bootstrap: (N,) like rewards, value after each segment; 0 without it
    gamma, lam: discount and trace decay, in [0, 1]

    The result is not differentiable. NaN in, NaN out (towards the start of the same segment).
    Raises: ValueError for shapes, devices or cu_seqlens that do not fit, TypeError for dtypes.
    Source: Schulman et al., arXiv 1506.02438, equation 16.
    """
    _check(rewards, values, cu_seqlens, mask, bootstrap)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gae: gamma and lam must be in [0, 1], got gamma={gamma} and lam={lam}")
    return _op(rewards, values, cu_seqlens, mask, bootstrap, gamma, lam)
