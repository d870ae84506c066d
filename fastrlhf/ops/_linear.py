"""What the ops on a linear head share: logits a chunk of rows at a time, and the products that their gradient takes.

Every op makes the logits of a chunk in one buffer, reads them, perhaps overwrites them with their gradient there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops._check import computed_in
from fastrlhf.ops._registry import BACKENDS

WEIGHT_ROWS = 4096  # half-precision weights are widened this many rows at a time
SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float lora_scale, float logit_scale,"
    " float? logit_softcap, int chunk_size, bool batch_invariant"
)
GRADIENTS = "Tensor, Tensor, Tensor, Tensor, Tensor"  # the fields of Gradients
TILE = 64  # matrix libraries treat rows alike in products of that many; two threads share 7 rows as 4 and 3


def if_fused(chunks: Callable[..., Any]) -> Callable[..., Any] | None:
    """What serves CUDA: these chunks, or None (for the reference) without Triton, as they go through its kernels."""
    return chunks if BACKENDS["token_logprobs"]["cuda"] == "native" else None


class Head(NamedTuple):
    """Hidden states and the head on them: logits = cap tanh(scale x / cap), and scale x without a cap, with
    x = hidden weight^T + lora_scale (hidden lora_a^T) lora_b^T + bias.

    Leaves take these fields before their other arguments, as SCHEMA declares them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    lora_scale: float
    scale: float
    cap: float | None
    chunk_size: int
    batch_invariant: bool

    @classmethod
    def split(cls, args: tuple[Any, ...]) -> tuple[Head, tuple[Any, ...]]:
        """The head and the other arguments of a leaf.

        Its matrices then have rows or columns side by side, as matrix products want them."""
        head, rest = cls(*args[: len(cls._fields)]), args[len(cls._fields) :]
        matrices = {"weight": head.weight, "lora_a": head.lora_a, "lora_b": head.lora_b}
        spread: dict[str, Any] = {name: m for name, m in matrices.items() if m is not None and 1 not in m.stride()}
        return head._replace(**{name: m.contiguous() for name, m in spread.items()}), rest

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What may get a gradient, as in `Gradients`."""
        return self.hidden, self.weight, self.bias, self.lora_a, self.lora_b

    @property
    def tile(self) -> int:
        """The rows of every product over rows, so that these are of one shape; 0: as many as there are."""
        return self.chunk_size if self.batch_invariant else 0

    def rows(self, rows: slice | Tensor) -> Head:
        """The same head on some of the rows."""
        return self._replace(hidden=self.hidden[rows])

    def columns(self, columns: slice) -> Head:
        """The same rows on the head of some tokens of the vocabulary."""
        bias, lora_b = (None if t is None else t[columns] for t in (self.bias, self.lora_b))
        return self._replace(weight=self.weight[columns], bias=bias, lora_b=lora_b)

    def temperatures(self, temperature: Tensor) -> Tensor:
        """(T,) what the logits of rows are to be divided by: without a cap the scale is applied here, at no cost."""
        return (temperature / self.scale if self.cap is None else temperature).expand(self.hidden.shape[0])

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

    def buffer(self, cuts: list[slice]) -> Tensor:
        """Memory for the logits of the largest of these chunks; float32 for half precision."""
        size = self.tile or max((rows.stop - rows.start for rows in cuts), default=0)
        return self.hidden.new_empty((size, self.weight.shape[0]), dtype=computed_in(self.hidden))

    def logits(self, buffer: Tensor) -> Tensor:
        """The logits of these rows, a chunk, made in `buffer`."""
        count, hidden = self.hidden.shape[0], self._tiled(self.hidden).contiguous()
        out = buffer[: hidden.shape[0]]
        if hidden.dtype != out.dtype and out.is_cuda:  # tensor cores, the sum kept in float32
            torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
        else:
            hidden = hidden.to(out.dtype)
            for block, weight in self.weight_blocks(out.dtype):
                torch.mm(hidden, weight.t(), out=out[:, block])
        if self.lora_b is not None:
            out.addmm_(self.low(), self.lora_b.to(out.dtype).t())
        if self.bias is not None:
            out.add_(self.bias)
        if self.cap is not None:
            out.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return out[:count]

    def logits_ref(self) -> Tensor:
        """The logits of all rows, differentiable, but for the scale that `temperatures` holds."""
        wide = computed_in(self.hidden)
        logits = self.hidden.to(wide) @ self.weight.to(wide).t()
        if self.lora_a is not None and self.lora_b is not None:
            low = self.hidden.to(wide) @ self.lora_a.to(wide).t()
            logits = logits + self.lora_scale * low @ self.lora_b.to(wide).t()
        logits = logits if self.bias is None else logits + self.bias
        return logits if self.cap is None else self.cap * (self.scale * logits / self.cap).tanh()

    def _tiled(self, rows: Tensor) -> Tensor:
        """The rows, with rows of zeros below them where a tile is to be filled."""
        missing = max(0, self.tile - rows.shape[0])
        return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows

    def turn_into_gradient(self, logits: Tensor, upstream: list[Tensor | None], rows: list[Tensor]) -> None:
        """Writes d loss / d x over the logits, but for the scale that `temperatures` holds."""
        slope = self.slope(logits)
        torch.ops.fastrlhf.token_logprobs_backward_(*upstream, logits, *rows)
        if slope is not None:
            logits.mul_(slope)

    def slope(self, logits: Tensor) -> Tensor | None:
        """d logits / d x of capped logits."""
        return None if self.cap is None else (logits / self.cap).square_().neg_().add_(1).mul_(self.scale)

    def low(self) -> Tensor:
        """lora_scale hidden lora_a^T of these rows and those that fill the tile, in float32 for half precision."""
        assert self.lora_a is not None
        wide = computed_in(self.hidden)
        return torch.mm(self._tiled(self.hidden).to(wide), self.lora_a.to(wide).t()).mul_(self.lora_scale)

    def low_gradient(self, grad_logits: Tensor) -> Tensor | None:
        """lora_scale grad_logits lora_b, of as many rows as `low`."""
        if self.lora_b is None:
            return None
        b, rank = self.lora_b.to(grad_logits.dtype), self.lora_b.shape[1]
        if self.tile:  # MKL treats rows alike in products of 8 columns, but not in those of 5 to 7
            b = torch.nn.functional.pad(b, (0, -rank % 8))
        return torch.mm(self._tiled(grad_logits), b)[:, :rank].mul_(self.lora_scale)

    def hidden_gradient(self, grad_logits: Tensor, low_gradient: Tensor | None) -> Tensor:
        """grad_logits weight + low_gradient lora_a, summed in the dtype of grad_logits."""
        count, grad_logits = grad_logits.shape[0], self._tiled(grad_logits)
        if self.weight.dtype != grad_logits.dtype and grad_logits.is_cuda:
            out = torch.mm(grad_logits.to(self.weight.dtype), self.weight, out_dtype=grad_logits.dtype)
        else:
            out = grad_logits.new_zeros(grad_logits.shape[0], self.weight.shape[1])
            for block, weight in self.weight_blocks(grad_logits.dtype):
                out.addmm_(grad_logits[:, block], weight)
        if low_gradient is not None and self.lora_a is not None:
            out.addmm_(low_gradient, self.lora_a.to(out.dtype))
        return out[:count]


def even_cuts(begin: int, end: int, chunk_size: int) -> list[slice]:
    """Slices of at most chunk_size rows from begin to end, nearly equal in size."""
    num_chunks = max(1, -(-(end - begin) // chunk_size))
    size = max(1, -(-(end - begin) // num_chunks))
    return [slice(start, min(start + size, end)) for start in range(begin, end, size)]


def used_rows(*grads: Tensor | None) -> Tensor:
    """The indices of rows in which any of these is not 0."""
    return torch.stack([g != 0 for g in grads if g is not None]).any(0).nonzero()[:, 0]


class Gradients(NamedTuple):
    """The gradients of a head's tensors, all but that of hidden summed over chunks in float32 or wider; empty where
    none is wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor

    @classmethod
    def zeros(cls, head: Head, wanted: list[bool], hidden_dtype: torch.dtype) -> Gradients:
        shapes = (t.shape if t is not None and want else 0 for t, want in zip(head.tensors, wanted, strict=True))
        dtypes = [hidden_dtype] + [computed_in(head.hidden)] * (len(wanted) - 1)
        return cls(*(head.hidden.new_zeros(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)))

    def add(self, head: Head, grad_logits: Tensor, index: Tensor) -> None:
        """Adds what a chunk contributes; the rows of `head` are those of `index`."""
        hidden, low_gradient = head.hidden, None
        if self.hidden.ndim == 2 or self.lora_a.ndim == 2:
            low_gradient = head.low_gradient(grad_logits)
        if self.hidden.ndim == 2:
            of_rows = head.hidden_gradient(grad_logits, low_gradient)
            self.hidden.index_copy_(0, index, of_rows.to(self.hidden.dtype))
        if self.weight.ndim == 2:
            if hidden.dtype != self.weight.dtype and hidden.is_cuda:
                product = torch.mm(grad_logits.to(hidden.dtype).t(), hidden, out_dtype=self.weight.dtype)
                self.weight.add_(product)
            else:
                self.weight.addmm_(grad_logits.t(), hidden.to(self.weight.dtype))
        if self.bias.shape[0] > 0:
            self.bias.add_(grad_logits.sum(0))
        if self.lora_a.ndim == 2 and low_gradient is not None:
            self.lora_a.addmm_(low_gradient[: hidden.shape[0]].t(), hidden.to(self.lora_a.dtype))
        if self.lora_b.ndim == 2:
            self.lora_b.addmm_(grad_logits.t(), head.low()[: hidden.shape[0]])

    def rounded(self, head: Head) -> tuple[Tensor, ...]:
        """Each in the dtype of its tensor."""
        pairs = zip(self, head.tensors, strict=True)
        return tuple(grad if t is None else grad.to(t.dtype) for grad, t in pairs)
