"""Small inputs for self-tests: logits with targets, and padded rewards with values and a mask of gaps and padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def logits_and_targets(device: str, *shape: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits with a gradient and targets below the vocabulary, in the dtypes that train on the device."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64) if device == "cpu" else (torch.float32, torch.bfloat16):
        logits = (4 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()
        yield logits, torch.randint(shape[-1], shape[:-1], generator=generator).to(device)


def heads(device: str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Hidden states, weight and bias with gradients, and targets."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16):
        # logits of a few units, as models have: peers round them to the dtype of the hidden states, ours are not
        made = [torch.randn(shape, generator=generator) / 3 for shape in ((64, 32), (1000, 32), (1000,))]
        hidden, weight, bias = (t.to(device, dtype).requires_grad_() for t in made)
        yield hidden, weight, bias, torch.randint(1000, (64,), generator=generator).to(device)


def rewards_values_mask(device: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(6, 40): a full row, padding, gaps of other people's tokens, one token, none."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 6, 40, generator=generator).to(device)
    mask = torch.ones(6, 40, dtype=torch.int64, device=device)
    mask[1, 25:] = 0
    mask[2, 10:20] = mask[2, 35:] = 0
    mask[3, ::2] = 0
    mask[4, 1:] = 0
    mask[5] = 0
    for kind in (torch.int64, torch.float32, torch.bool):
        yield rewards, values, mask.to(kind)


def rewards_mask(device: str) -> Iterator[tuple[Any, ...]]:
    yield from ((rewards, mask) for rewards, _, mask in rewards_values_mask(device))
