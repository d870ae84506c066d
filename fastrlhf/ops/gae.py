"""Generalised advantage estimation over a packed batch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import (
    WIDE,
    address,
    contiguous,
    cu_seqlens_of,
    dtype_in,
    dtype_name,
    has_shape,
    mask_of,
    same_device,
    same_shape,
    widen,
)
from fastrlhf.ops._launch import if_built, launch
from fastrlhf.ops._registry import op

GAPS = ("carry", "zero")


def gae_ref(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    zero_gaps: bool,
) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    lengths, last = cu_seqlens.diff().long(), cu_seqlens[1:].long() - 1
    after = rewards.new_zeros(len(lengths))  # the advantage and the value of what follows, of each sequence
    value_after = after.clone() if bootstrap is None else bootstrap.clone()
    for back in range(int(lengths.max()) if len(lengths) else 0):
        long_enough = lengths > back
        t = last[long_enough] - back
        advantage, value = after[long_enough], value_after[long_enough]
        here = rewards[t] + gamma * value - values[t] + gamma * lam * advantage
        value_here, counts = values[t], torch.ones_like(t, dtype=torch.bool) if mask is None else mask[t]
        if zero_gaps:
            advantage, value = gamma * value + gamma * lam * advantage, torch.zeros_like(value)
        advantages[t], returns[t] = torch.where(counts, here, 0), torch.where(counts, here + value_here, 0)
        after[long_enough] = torch.where(counts, here, advantage)
        value_after[long_enough] = torch.where(counts, value_here, value)
    return advantages, returns


def _check(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, mask: Tensor | None, bootstrap: Tensor | None, *_: Any
) -> None:
    same_device("gae", rewards=rewards, values=values, cu_seqlens=cu_seqlens, mask=mask, bootstrap=bootstrap)
    dtype_in("gae", "rewards", rewards, WIDE)
    dtype_in("gae", "values", values, (rewards.dtype,))
    has_shape("gae", "rewards", rewards, (None,), "(T,)")
    same_shape("gae", rewards=rewards, values=values)
    cu_seqlens_of("gae", "cu_seqlens", cu_seqlens, rewards.shape[0])
    mask_of("gae", mask, rewards=rewards)
    if bootstrap is not None:
        dtype_in("gae", "bootstrap", bootstrap, (rewards.dtype,))
        has_shape("gae", "bootstrap", bootstrap, (cu_seqlens.shape[0] - 1,), "(N,)")


def _fake(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out)


def _prepared(*given: Tensor | None) -> tuple[tuple[Tensor, Tensor], list[Tensor | None]]:
    """(the outputs, what a kernel takes the addresses of: the inputs, contiguous, and the outputs)."""
    inputs = contiguous(*given)
    outputs = _fake(inputs[0])
    return outputs, [*inputs, *outputs]


def _cpu_forward(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, mask: Tensor | None, bootstrap: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    outputs, tensors = _prepared(rewards, values, cu_seqlens, mask, bootstrap)
    kernel = getattr(_cpu, f"gae_{dtype_name(rewards)}")
    kernel(*map(address, tensors), cu_seqlens.shape[0] - 1, *options, torch.get_num_threads())
    return outputs


def _cuda_forward(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, mask: Tensor | None, bootstrap: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    outputs, tensors = _prepared(rewards, values, cu_seqlens, mask, bootstrap)
    counts = rewards.shape[0], cu_seqlens.shape[0] - 1
    launch(f"gae_{dtype_name(rewards)}", rewards, *map(address, tensors), *counts, *options)
    return outputs


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for lengths in [(), (1,), (3, 0, 1, 5), (64,) * 8, (300, 2, 41)]:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        rewards, values = (torch.randn(sum(lengths), generator=generator).to(device, dtype) for _ in range(2))
        yield rewards, values, cu_seqlens, None, None, 0.99, 0.95, False
        mask = (torch.rand(sum(lengths), generator=generator) < 0.7).to(device)
        bootstrap = torch.randn(len(lengths), generator=generator).to(device, dtype)
        yield rewards, values, cu_seqlens, mask, bootstrap, 1.0, 0.9, False
        yield rewards, values, cu_seqlens, mask, bootstrap, 0.9, 0.9, True


_op = op(
    "gae(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor? mask, Tensor? bootstrap, float gamma, float lam,"
    " bool zero_gaps) -> (Tensor, Tensor)",
    ref=gae_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=if_built(_cuda_forward),
    check=_check,
    samples=samples,
)


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    gaps: str = "carry",
) -> tuple[Tensor, Tensor]:
    """Returns (advantages, returns) of each segment of a packed batch.

    delta_t = r_t + gamma V_next - V_t;  A_t = delta_t + gamma lam A_next;  R_t = A_t + V_t, where next is the next
    token of the same segment whose mask is True. After the last one V_next is `bootstrap[n]` and A_next is 0.

    rewards: (T,) float32|float64, reward of each token; half precision becomes float32
    values: (T,) like rewards, value of the state before each token
    cu_seqlens: (N + 1,) int32, segment n is tokens cu_seqlens[n] to cu_seqlens[n + 1]; may be empty. Padded tensors
        (B, L) are B segments of L tokens: flatten them, with torch.arange(0, B * L + 1, L, dtype=torch.int32)
    mask: (T,) bool, True where a token counts; both outputs are exactly 0 elsewhere, and nothing is read there
    bootstrap: (N,) like rewards, value after each segment; 0 without it
    gamma, lam: discount and trace decay, in [0, 1]
    gaps: what a token outside the mask is to those before it. "carry": as if cut out. "zero": a token of reward and
        value 0, so that the token before a gap sees V_next = 0 and the trace decays through the gap

    The result is not differentiable. NaN in, NaN out (towards the start of the same segment).
    Raises: ValueError for shapes, devices, cu_seqlens or options that do not fit, TypeError for dtypes.
    Source: Schulman et al., arXiv 1506.02438, equation 16.
    """
    rewards, values = widen(rewards), widen(values)
    bootstrap = None if bootstrap is None else widen(bootstrap)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gae: gamma and lam must be in [0, 1], got gamma={gamma} and lam={lam}")
    if gaps not in GAPS:
        raise ValueError(f"gae: gaps must be one of {', '.join(GAPS)}, got {gaps!r}")
    return _op(rewards, values, cu_seqlens, mask, bootstrap, gamma, lam, gaps == "zero")
