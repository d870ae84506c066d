"""Logits as peers hold them, (B, L, V) and often a slice, for our op on rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf.ops import token_logprobs


def plain(tensor: object) -> bool:
    """Whether this is a tensor of torch itself: DTensors and other subclasses stay with the peer."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def log_probs_and_entropy(logits: Tensor, index: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities of `index` (of token 0 without it) and entropies, in the shape of the rows."""
    if index is None:
        index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    index, size = index.long(), logits.shape[-1]
    if logits.ndim == 3 and logits.stride(0) != logits.shape[1] * logits.stride(1):
        # a slice such as logits[:, :-1]: flattening it would copy all logits, its batch entries are views
        rows = zip(logits.unbind(0), index.unbind(0), strict=True)
        outputs = [token_logprobs(z, i, temperature=temperature, return_entropy=True) for z, i in rows]
        return torch.stack([o[0] for o in outputs]), torch.stack([o[1] for o in outputs])
    flat = logits.reshape(-1, size)
    logprobs, entropy = token_logprobs(flat, index.reshape(-1), temperature=temperature, return_entropy=True)
    return logprobs.view(index.shape), entropy.view(index.shape)
