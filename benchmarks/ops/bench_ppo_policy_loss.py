"""ppo_policy_loss, its statistics included, against plain torch, torch.compile and verl's loss."""

import inspect
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.competitors import compiled, find
from fastrlhf import ppo_policy_loss

SIZES = {"cpu": [(16,), (4096,), (64, 1024), (1048576,)], "cuda": [(64, 1024), (4194304,)], "tiny": [(3, 5)]}
Outputs = tuple[Tensor, ...]


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    old = torch.randn(shape) - 3
    return old + 0.2 * torch.randn(shape), old, torch.randn(shape), torch.rand(shape) < 0.9


def ours(*inputs: Tensor) -> Outputs:
    loss, stats = ppo_policy_loss(*inputs)
    return loss, *stats.values()


def by_torch(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Outputs:
    count = mask.sum()
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    loss = torch.where(mask, torch.maximum(plain, clipped), 0).sum() / count
    with torch.no_grad():
        stats = [((clipped > plain) & mask), torch.where(mask, log_ratio.expm1() - log_ratio, 0), ratio * mask]
        extremes = torch.where(mask, ratio, -torch.inf).max(), torch.where(mask, ratio, torch.inf).min()
        return loss, *(x.sum() / count for x in stats), *extremes


def sequence_ours(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor) -> Outputs:
    flat = (x.flatten() for x in (logprobs, old_logprobs, advantages))
    loss, stats = ppo_policy_loss(*flat, ratio="sequence", cu_seqlens=cu_seqlens)
    return loss, *stats.values()


def sequence_torch(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor) -> Outputs:
    """For sequences of one length."""
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.mean(1, keepdim=True).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    with torch.no_grad():
        means = (clipped > plain).to(ratio.dtype).mean(), (log_ratio.expm1() - log_ratio).mean(), ratio.mean()
        stats = *means, ratio.max(), ratio.min()
    return torch.maximum(plain, clipped).mean(), *stats


def sequence_inputs(num: int, length: int) -> tuple[Tensor, ...]:
    return *inputs((num, length))[:3], torch.arange(0, num * length + 1, length, dtype=torch.int32)


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    verl = find("verl.trainer.ppo.core_algos")

    # without the warning that it is deprecated, which takes time at every call
    policy_loss = inspect.unwrap(verl.compute_policy_loss) if verl else None

    def by_verl(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Outputs:
        return policy_loss(old_logprobs, logprobs, advantages, mask, cliprange=0.2)[:1]

    functions = {"fastrlhf": ours, "torch": by_torch, "torch.compile": compiled(by_torch)}
    functions |= {"verl": by_verl} if verl else {}
    sequences = {"fastrlhf": sequence_ours, "torch": sequence_torch}
    for grads, what in (((), "forward"), ((0,), "forward + backward")):
        for shape in sizes:
            name = f"{'x'.join(map(str, shape))} tokens, {what}"
            yield Case(name, functions, partial(inputs, shape), by_torch, grads, atol=1e-4)
        for num, length in (shape for shape in sizes if len(shape) == 2):
            name = f"ratios of {num} sequences of {length}, {what}"
            yield Case(name, sequences, partial(sequence_inputs, num, length), sequence_torch, grads, atol=1e-4)
