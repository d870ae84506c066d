"""Tensors as peers hold them, padded and sliced, for our ops on rows and packs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrlhf.ops import token_logprobs


def plain(*tensors: object) -> bool:
    """Whether these are tensors of torch itself: DTensors and other subclasses stay with the peer."""
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def log_probs_and_entropy(
    logits: Tensor, index: Tensor | None, temperature: float = 1.0, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities of `index` (of token 0 without it) and entropies, in the shape of the rows."""
    if index is None:
        index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    index, size = index.long(), logits.shape[-1]
    options: dict[str, Any] = {"temperature": temperature, "return_entropy": True, "inplace_backward": in_place}
    if logits.ndim == 3 and logits.stride(0) != logits.shape[1] * logits.stride(1):
        # a slice such as logits[:, :-1]: flattening it would copy all logits, its batch entries are views
        rows = zip(logits.unbind(0), index.unbind(0), strict=True)
        outputs = [token_logprobs(z, i, **(options | {"inplace_backward": False})) for z, i in rows]
        return torch.stack([o[0] for o in outputs]), torch.stack([o[1] for o in outputs])
    logprobs, entropy = token_logprobs(logits.reshape(-1, size), index.reshape(-1), **options)
    return logprobs.view(index.shape), entropy.view(index.shape)


def fraction(*numbers: object) -> bool:
    """Whether these are numbers in [0, 1], as our ops want discounts."""
    return all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in numbers)


def padded(mask: object, *tensors: object) -> bool:
    """Whether these are (B, L) tensors of one real dtype, and `mask` of zeros and ones is like them."""
    if not plain(mask, *tensors):
        return False
    assert isinstance(mask, Tensor)
    like = [t for t in tensors if isinstance(t, Tensor)]
    fits = mask.ndim == 2 and mask.numel() > 0 and like[0].dtype in (torch.float32, torch.float64)
    fits = fits and all(t.shape == mask.shape and t.dtype == like[0].dtype and t.device == mask.device for t in like)
    return fits and (mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all()))


def ends_of_rows(tensor: Tensor) -> Tensor:
    """cu_seqlens of the rows of a (B, L) tensor, flattened."""
    rows, length = tensor.shape
    return torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=tensor.device)
