"""What the ops on a linear head share: logits a chunk of rows at a time, and the products that their gradient takes.

Every op makes the logits of a chunk in one buffer, reads them, perhaps overwrites them with their gradient there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops._check import dtype_in, has_shape, indices_below, same_device
from fastrlhf.ops.token_logprobs import FLOATS, computed_in

WEIGHT_ROWS = 4096  # half-precision weights are widened this many rows at a time


class Head(NamedTuple):
    """logits = cap tanh(scale x / cap) with x = hidden weight^T + bias; scale x without a cap."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    cap: float | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, scale: float = 1.0, cap: float | None = None) -> Head:
        """The head whose weight has rows or columns side by side, as matrix products want them."""
        return cls(weight if 1 in weight.stride() else weight.contiguous(), bias, scale, cap)

    def temperatures(self, temperature: Tensor, num_rows: int) -> Tensor:
        """(T,) what the rows of `chunks` are to be divided by: without a cap the scale is applied here, at no cost."""
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

    def chunks(self, hidden: Tensor, cuts: list[slice]) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the rows and their logits, in a buffer that the next chunk reuses; float32 for half precision."""
        size = max((rows.stop - rows.start for rows in cuts), default=0)
        buffer = hidden.new_empty((size, self.weight.shape[0]), dtype=computed_in(hidden))
        for rows in cuts:
            yield rows, self._logits(hidden[rows].contiguous(), buffer[: rows.stop - rows.start])

    def _logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        if hidden.dtype != out.dtype and out.is_cuda:  # tensor cores, the sum kept in float32
            torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
        else:
            hidden = hidden.to(out.dtype)
            for block, weight in self.weight_blocks(out.dtype):
                torch.mm(hidden, weight.t(), out=out[:, block])
        if self.bias is not None:
            out.add_(self.bias)
        return out if self.cap is None else out.mul_(self.scale / self.cap).tanh_().mul_(self.cap)

    def turn_into_gradient(self, logits: Tensor, upstream: list[Tensor | None], rows: list[Tensor]) -> None:
        """Writes d loss / d x over the logits, but for the scale that `temperatures` holds."""
        slope = None if self.cap is None else (logits / self.cap).square_().neg_().add_(1).mul_(self.scale)
        torch.ops.fastrlhf.token_logprobs_backward_(*upstream, logits, *rows)
        if slope is not None:
            logits.mul_(slope)

    def hidden_gradient(self, grad_logits: Tensor) -> Tensor:
        """grad_logits weight, summed in the dtype of grad_logits."""
        if self.weight.dtype != grad_logits.dtype and grad_logits.is_cuda:
            return torch.mm(grad_logits.to(self.weight.dtype), self.weight, out_dtype=grad_logits.dtype)
        out = grad_logits.new_zeros(grad_logits.shape[0], self.weight.shape[1])
        for block, weight in self.weight_blocks(grad_logits.dtype):
            out.addmm_(grad_logits[:, block], weight)
        return out


def even_cuts(num_rows: int, chunk_size: int) -> list[slice]:
    """Slices of at most chunk_size rows, nearly equal in size."""
    num_chunks = max(1, -(-num_rows // chunk_size))
    size = max(1, -(-num_rows // num_chunks))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


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


def check_head(function: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Raises unless these are (T, D), (V, D), (T,) with 0 <= targets < V, and (V,) or None."""
    same_device(function, hidden=hidden, weight=weight, targets=targets, bias=bias)
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
    indices_below(function, "targets", targets, weight.shape[0])


def check_options(function: str, logit_scale: float, logit_softcap: float | None, chunk_size: int) -> None:
    """Raises unless the options of a head and its chunks are in range."""
    for option, value in (("logit_scale", logit_scale), ("logit_softcap", logit_softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{function}: {option} must be above 0 and finite, got {value}")
    if chunk_size < 1:
        raise ValueError(f"{function}: chunk_size must be at least 1, got {chunk_size}")
