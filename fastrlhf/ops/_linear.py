"""What the ops on a linear head share: logits a chunk of rows at a time, and the products that their gradient takes.

Every op makes the logits of a chunk in one buffer, reads them, perhaps overwrites them with their gradient there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops._check import dtype_in, has_shape, indices_below, mask_of, readable, same_device
from fastrlhf.ops.token_logprobs import FLOATS, computed_in

WEIGHT_ROWS = 4096  # half-precision weights are widened this many rows at a time
TILE = 64  # matrix libraries treat rows alike in products of that many; two threads share 7 rows as 4 and 3


class Head(NamedTuple):
    """logits = cap tanh(scale x / cap) with x = hidden weight^T + bias; scale x without a cap."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    cap: float | None
    tile: int

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        scale: float = 1.0,
        cap: float | None = None,
        chunk_size: int = 512,
        batch_invariant: bool = False,
    ) -> Head:
        """The head whose weight has rows or columns side by side, as matrix products want them.

        To be batch-invariant, products over rows are all of one shape, tile = chunk_size rows."""
        weight = weight if 1 in weight.stride() else weight.contiguous()
        return cls(weight, bias, scale, cap, chunk_size if batch_invariant else 0)

    def temperatures(self, temperature: Tensor, num_rows: int) -> Tensor:
        """(T,) what the logits of rows are to be divided by: without a cap the scale is applied here, at no cost."""
        return (temperature / self.scale if self.cap is None else temperature).expand(num_rows)

    def weight_blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The rows of the weight in `dtype`: all at once, or widened block by block in a buffer that is reused."""
        if self.weight.dtype == dtype:
            yield slice(None), self.weight
            return
        size, width = self.weight.shape
        buffer = self.weight.new_empty((min(WEIGHT_ROWS, size), width), dtype=dtype)
        for start in range(0, size, WEIGHT_ROWS):
            rows = slice(start, min(start + WEIGHT_ROWS, size))
            yield rows, buffer[: rows.stop - start].copy_(self.weight[rows])

    def buffer(self, hidden: Tensor, cuts: list[slice]) -> Tensor:
        """Memory for the logits of the largest of these chunks; float32 for half precision."""
        size = self.tile or max((rows.stop - rows.start for rows in cuts), default=0)
        return hidden.new_empty((size, self.weight.shape[0]), dtype=computed_in(hidden))

    def logits(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """The logits of a chunk, made in `buffer`."""
        count, hidden = hidden.shape[0], self._tiled(hidden).contiguous()
        out = buffer[: hidden.shape[0]]
        if hidden.dtype != out.dtype and out.is_cuda:  # tensor cores, the sum kept in float32
            torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
        else:
            hidden = hidden.to(out.dtype)
            for block, weight in self.weight_blocks(out.dtype):
                torch.mm(hidden, weight.t(), out=out[:, block])
        if self.bias is not None:
            out.add_(self.bias)
        if self.cap is not None:
            out.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return out[:count]

    def _tiled(self, rows: Tensor) -> Tensor:
        """The rows, with rows of zeros below them where a tile is to be filled."""
        missing = max(0, self.tile - rows.shape[0])
        return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows

    def turn_into_gradient(self, logits: Tensor, upstream: list[Tensor | None], rows: list[Tensor]) -> None:
        """Writes d loss / d x over the logits, but for the scale that `temperatures` holds."""
        slope = None if self.cap is None else (logits / self.cap).square_().neg_().add_(1).mul_(self.scale)
        torch.ops.fastrlhf.token_logprobs_backward_(*upstream, logits, *rows)
        if slope is not None:
            logits.mul_(slope)

    def hidden_gradient(self, grad_logits: Tensor) -> Tensor:
        """grad_logits weight, summed in the dtype of grad_logits."""
        count, grad_logits = grad_logits.shape[0], self._tiled(grad_logits)
        if self.weight.dtype != grad_logits.dtype and grad_logits.is_cuda:
            return torch.mm(grad_logits.to(self.weight.dtype), self.weight, out_dtype=grad_logits.dtype)[:count]
        out = grad_logits.new_zeros(grad_logits.shape[0], self.weight.shape[1])
        for block, weight in self.weight_blocks(grad_logits.dtype):
            out.addmm_(grad_logits[:, block], weight)
        return out[:count]


def even_cuts(begin: int, end: int, chunk_size: int) -> list[slice]:
    """Slices of at most chunk_size rows from begin to end, nearly equal in size."""
    num_chunks = max(1, -(-(end - begin) // chunk_size))
    size = max(1, -(-(end - begin) // num_chunks))
    return [slice(start, min(start + size, end)) for start in range(begin, end, size)]


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, differentiably; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def used_rows(*grads: Tensor | None) -> Tensor:
    """The indices of rows in which any of these is not 0."""
    return torch.stack([g != 0 for g in grads if g is not None]).any(0).nonzero()[:, 0]


def wanted_gradients(*tensors: Tensor | None) -> list[bool]:
    """Which of these need a gradient, for ops that make it in the forward."""
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]


class Gradients(NamedTuple):
    """The gradients of hidden, weight and bias, the latter two summed over chunks in float32 or wider; empty where none
    is wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def zeros(cls, hidden: Tensor, weight: Tensor, wanted: list[bool], hidden_dtype: torch.dtype) -> Gradients:
        wide = computed_in(hidden)
        shapes, dtypes = (hidden.shape, weight.shape, weight.shape[:1]), (hidden_dtype, wide, wide)
        return cls(*(hidden.new_zeros(s if w else 0, dtype=d) for s, d, w in zip(shapes, dtypes, wanted, strict=True)))

    def add(self, head: Head, hidden: Tensor, grad_logits: Tensor, index: Tensor) -> None:
        """Adds what a chunk contributes; its rows are those of `index`."""
        if self.hidden.ndim == 2:
            self.hidden.index_copy_(0, index, head.hidden_gradient(grad_logits).to(self.hidden.dtype))
        if self.weight.ndim == 2:
            if hidden.dtype != self.weight.dtype and hidden.is_cuda:
                product = torch.mm(grad_logits.to(hidden.dtype).t(), hidden, out_dtype=self.weight.dtype)
                self.weight.add_(product)
            else:
                self.weight.addmm_(grad_logits.t(), hidden.to(self.weight.dtype))
        if self.bias.shape[0] > 0:
            self.bias.add_(grad_logits.sum(0))


def check_head(
    function: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, mask: Tensor | None = None
) -> None:
    """Raises unless these are (T, D), (V, D), (T,) with 0 <= targets < V where the mask is True, (V,) and (T,)."""
    same_device(function, hidden=hidden, weight=weight, targets=targets, bias=bias, mask=mask)
    dtype_in(function, "hidden", hidden, FLOATS)
    dtype_in(function, "weight", weight, (hidden.dtype,))
    dtype_in(function, "targets", targets, (torch.int64,))
    has_shape(function, "hidden", hidden, (None, None), "(T, D)")
    has_shape(function, "weight", weight, (None, hidden.shape[1]), "(V, D)")
    has_shape(function, "targets", targets, hidden.shape[:1], "(T,)")
    if weight.shape[0] == 0:
        raise ValueError(f"{function}: weight must have at least one row, got {tuple(weight.shape)}")
    if bias is not None:
        dtype_in(function, "bias", bias, (hidden.dtype,))
        has_shape(function, "bias", bias, weight.shape[:1], "(V,)")
    mask_of(function, mask, targets=targets)
    if mask is not None and readable(mask):
        targets = targets[mask]
    indices_below(function, "targets", targets, weight.shape[0])


def check_options(
    function: str, logit_scale: float, logit_softcap: float | None, chunk_size: int, batch_invariant: bool
) -> None:
    """Raises unless the options of a head and its chunks are in range."""
    for option, value in (("logit_scale", logit_scale), ("logit_softcap", logit_softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{function}: {option} must be above 0 and finite, got {value}")
    if chunk_size < 1:
        raise ValueError(f"{function}: chunk_size must be at least 1, got {chunk_size}")
    if batch_invariant and chunk_size % TILE:
        raise ValueError(f"{function}: with batch_invariant chunk_size must be a multiple of {TILE}, got {chunk_size}")
