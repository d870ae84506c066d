"""From scores and log-probs to what PPO trains on: rewards, whitened advantages, returns."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import (
    WIDE,
    address,
    bounds_rise,
    cu_seqlens_of,
    dtype_in,
    dtype_name,
    has_shape,
    mask_of,
    readable,
    same_device,
    same_shape,
    widen,
)
from fastrlhf.ops._launch import if_built, launch
from fastrlhf.ops._registry import op
from fastrlhf.ops.gae import gae_ref
from fastrlhf.ops.masked_whiten import masked_moments_ref, masked_whiten, masked_whiten_ref

STATS = ("kl", "rewards", "values", "returns", "advantages", "advantages_std", "explained_variance")
EPS = 1e-8
ROWS = (512, 9)  # the CUDA kernel's workspace
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def ppo_advantages_ref(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten: bool,
) -> Outputs:
    kl = logprobs - ref_logprobs
    rewards = (-kl_coef * kl).index_add(0, cu_seqlens[1:].long() - 1, scores)
    advantages, returns = gae_ref(rewards, values, cu_seqlens, None, None, gamma, lam, False)
    squared_advantage = masked_moments_ref(advantages, None)[2]
    squared_return = (returns - returns.sum() / max(len(returns), 1)).square().sum()
    num_tokens, num_sequences = max(len(values), 1), max(len(scores), 1)
    stats = [kl.sum() / num_sequences, rewards.sum() / num_sequences]
    stats += [x.sum() / num_tokens for x in (values, returns, advantages)]
    explained = torch.where(squared_return == 0, 0, 1 - squared_advantage / squared_return)
    stats += [(squared_advantage / num_tokens).sqrt(), explained]
    if whiten:
        advantages = masked_whiten_ref(advantages, None, None, True, EPS)
    return rewards, advantages, returns, torch.stack([s.to(values.dtype) for s in stats])


def _fits(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, cu_seqlens: Tensor) -> None:
    """Raises unless the tensors go together, with responses of no tokens among them or not."""
    name, tokens = "ppo_advantages", {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values}
    same_device(name, scores=scores, **tokens, cu_seqlens=cu_seqlens)
    dtype_in(name, "scores", scores, WIDE)
    for argument, tensor in tokens.items():
        dtype_in(name, argument, tensor, (scores.dtype,))
    has_shape(name, "logprobs", logprobs, (None,), "(R,)")
    same_shape(name, **tokens)
    cu_seqlens_of(name, "cu_seqlens", cu_seqlens, logprobs.shape[0])
    has_shape(name, "scores", scores, (cu_seqlens.shape[0] - 1,), "(N,)")


def _check(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, cu_seqlens: Tensor, *_: Any) -> None:
    name = "ppo_advantages"
    _fits(scores, logprobs, ref_logprobs, values, cu_seqlens)
    if readable(cu_seqlens) and not bounds_rise(cu_seqlens, logprobs.shape[0], least=1):
        empty = cu_seqlens.diff().tolist().index(0)
        raise ValueError(f"{name}: sequence {empty} has no tokens, so its score would be lost")


def _fake(scores: Tensor, logprobs: Tensor, *_: Any) -> Outputs:
    rewards = torch.empty_like(logprobs, memory_format=torch.contiguous_format)
    return rewards, torch.empty_like(rewards), torch.empty_like(rewards), scores.new_empty(len(STATS))


def _prepared(*given: Tensor) -> tuple[Outputs, list[Tensor]]:
    """(the outputs, what a kernel takes the addresses of: the inputs, contiguous, and the outputs)."""
    outputs = _fake(*given)
    return outputs, [*(x.contiguous() for x in given), *outputs]


def _cpu_forward(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, cu_seqlens: Tensor, *options: Any
) -> Outputs:
    outputs, tensors = _prepared(scores, logprobs, ref_logprobs, values, cu_seqlens)
    kernel = getattr(_cpu, f"ppo_advantages_{dtype_name(scores)}")
    kernel(*map(address, tensors), scores.shape[0], *options, EPS, torch.get_num_threads())
    return outputs


def _cuda_forward(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, cu_seqlens: Tensor, *options: Any
) -> Outputs:
    outputs, tensors = _prepared(scores, logprobs, ref_logprobs, values, cu_seqlens)
    tensors.append(scores.new_empty(ROWS, dtype=torch.float64))
    counts = logprobs.shape[0], scores.shape[0]
    launch(f"ppo_advantages_{dtype_name(scores)}", scores, *map(address, tensors), *counts, *options, EPS)
    return outputs


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for i, lengths in enumerate([(), (1,), (3, 2, 1, 5), (40,) * 9, (300, 2, 41)]):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        logprobs, noise, values = (torch.randn(sum(lengths), generator=generator) for _ in range(3))
        scores = torch.randn(len(lengths), generator=generator)
        args = [x.to(device, dtype) for x in (scores, logprobs - 3, logprobs + 0.2 * noise - 3, values)]
        yield *args, cu_seqlens, 0.05, 1.0, 0.95, True
        yield *args, cu_seqlens, 0.2, 0.99, 0.9, i % 2 == 0
    yield *args, cu_seqlens, 0.0, 1.0, 1.0, False


_op = op(
    "ppo_advantages(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor cu_seqlens,"
    " float kl_coef, float gamma, float lam, bool whiten) -> (Tensor, Tensor, Tensor, Tensor)",
    ref=ppo_advantages_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=if_built(_cuda_forward),
    check=_check,
    samples=samples,
)


def _of_masked(
    mask: Tensor, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, ...]:
    """The five tensors with the masked tokens cut out, and with them the responses that have no others."""
    _fits(scores, logprobs, ref_logprobs, values, cu_seqlens)
    same_device("ppo_advantages", logprobs=logprobs, mask=mask)
    mask_of("ppo_advantages", mask, logprobs=logprobs)
    counted = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
    bounds = counted[cu_seqlens.long()].to(torch.int32)
    some = bounds.diff() > 0
    bounds = torch.cat([bounds[:1], bounds[1:][some]])
    return scores[some], logprobs[mask], ref_logprobs[mask], values[mask], bounds


def ppo_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    whiten: bool = True,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Returns (rewards, advantages, returns, stats) of sampled responses.

    r_t = -kl_coef (logprobs_t - ref_logprobs_t), plus the score at the last token of each response; advantages and
    returns are those of `gae` on these rewards, with nothing after the last token. Then the advantages are whitened
    (`masked_whiten`) over all tokens at once; the returns are not. The penalty is k1 of `approx_kl`, whose sum over a
    sampled response is an unbiased estimate of the KL divergence of the policy from the reference.

    scores: (N,) float32|float64, of whole responses; half precision becomes float32
    logprobs: (R,) like scores, of the response tokens under the policy that sampled them
    ref_logprobs: (R,) like scores, of the same tokens under the reference
    values: (R,) like scores, value of the state before each token
    cu_seqlens: (N + 1,) int32, response n is tokens cu_seqlens[n] to cu_seqlens[n + 1], of which there must be some
    kl_coef: coefficient of the KL penalty, from 0 up
    gamma, lam: discount and trace decay, in [0, 1]
    mask: (R,) bool, True where a token counts; False for what the policy did not sample, such as the output of a tool.
        Everything is as if the other tokens were cut out: the score comes at the last that counts, what follows a token
        is the next that counts, nothing else is looked at, and the three results are 0 there. A response in which none
        counts is left out: its score goes nowhere, and the stats are over the others. On a GPU it waits for the device
    whiten: False leaves the advantages as they are
    group: whiten over all processes of this group

    stats, of this process and detached: kl and rewards (summed over a response, mean over responses); values, returns,
    advantages (means over tokens) and advantages_std, before whitening; explained_variance, 1 - var(A) / var(R), or 0
    where all returns are equal.

    The results are not differentiable and do not depend on the number of threads. NaN in, NaN out.
    Raises: ValueError for shapes, devices, cu_seqlens, an empty response or options that do not fit, TypeError for
    dtypes.
    Source: Ziegler et al., arXiv 1909.08593, equation 2; Schulman et al., arXiv 1506.02438, equation 16.
    """
    scores, logprobs, ref_logprobs, values = (widen(x) for x in (scores, logprobs, ref_logprobs, values))
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"ppo_advantages: kl_coef must be a number from 0 up, got {kl_coef}")
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"ppo_advantages: gamma and lam must be in [0, 1], got gamma={gamma} and lam={lam}")
    inputs = scores, logprobs, ref_logprobs, values, cu_seqlens
    if mask is not None:
        inputs = _of_masked(mask, *inputs)  # type: ignore[assignment]
    rewards, advantages, returns, stats = _op(*inputs, kl_coef, gamma, lam, whiten and group is None)
    if whiten and group is not None:
        advantages = masked_whiten(advantages, eps=EPS, group=group)
    if mask is not None:
        shape = logprobs.shape
        rewards, advantages, returns = (
            x.new_zeros(shape).masked_scatter(mask, x) for x in (rewards, advantages, returns)
        )
    return rewards, advantages, returns, dict(zip(STATS, stats.unbind(), strict=True))
