"""What the ops on a linear head share: logits a chunk of rows at a time, and the products that their gradient takes.

Every op makes the logits of a chunk in one buffer, reads them, perhaps overwrites them with their gradient there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops._check import dtype_in, has_shape, indices_below, mask_of, readable, same_device
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


def loss_in_chunks(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: Tensor,
    kept: Tensor,
    wanted: list[bool],
    cuts: list[slice],
    upstream: Callable[[slice, Tensor, Tensor], list[Tensor | None]],
) -> tuple[Tensor, Tensor, Gradients]:
    """Returns logprobs and entropy (K,) of the rows of hidden in `kept` (K,), and the gradients of a loss on them, made
    while the logits of a chunk exist, in three matrix products.

    upstream(rows, logprobs, entropy): the gradients of the loss in the logprobs and entropies of a chunk, which is
    rows of the K; not asked for where no gradient is wanted"""
    grads = Gradients.zeros(hidden, head.weight, wanted, computed_in(hidden))
    temperature = head.temperatures(temperature, hidden.shape[0])
    if kept.shape[0] < hidden.shape[0]:
        hidden, targets, temperature = (t.index_select(0, kept) for t in (hidden, targets, temperature))
    logprobs, entropy = (hidden.new_empty(hidden.shape[0], dtype=computed_in(hidden)) for _ in range(2))
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, logits in head.chunks(hidden, cuts):
            of_rows = targets[rows], temperature[rows]
            logprobs[rows], entropy[rows], *sums = torch.ops.fastrlhf.token_logprobs(logits, *of_rows)
            if any(wanted):
                given = upstream(rows, logprobs[rows], entropy[rows])
                head.turn_into_gradient(logits, given, [*of_rows, entropy[rows], *sums])
                grads.add(head, hidden[rows], logits, kept[rows])
    return logprobs, entropy, grads


def gradients_ref(
    loss_of: Callable[..., Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> Gradients:
    """By autograd, what the references of losses return as gradients: those of loss_of(hidden, weight, bias)."""
    wide, tensors = computed_in(hidden), (hidden, weight, bias)
    leaves = [None if t is None else t.detach().to(wide).requires_grad_() for t in tensors]
    with torch.enable_grad():
        loss = loss_of(*leaves)
    chosen = [t for t, want in zip(leaves, wanted, strict=True) if want and t is not None]
    grads = iter(torch.autograd.grad(loss, chosen))
    return Gradients(*(next(grads) if want else hidden.new_zeros(0, dtype=wide) for want in wanted))


def kept_rows(mask: Tensor | None, like: Tensor) -> Tensor:
    """The indices of the rows that count, (K,) int64 beside `like`."""
    return torch.arange(like.shape[0], device=like.device) if mask is None else mask.nonzero()[:, 0]


def wanted_gradients(*tensors: Tensor | None) -> list[bool]:
    """Which of these need a gradient, for ops that make it in the forward."""
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """setup_context of an op that returns a loss, perhaps statistics, and last its three gradients."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the gradients of gradients would be as large as the weight
    ctx.save_for_backward(*output[-3:])
    ctx.dtype = inputs[0].dtype


def scaled_gradients(ctx: Any, grad_loss: Tensor | None, needed: list[bool]) -> list[Tensor | None]:
    """The saved gradients times that of the loss, rounded to the dtype of the inputs only now.

    They are scaled where they are unless the graph is kept for another backward, so that no second (V, D) exists."""
    if grad_loss is None:
        return [None] * 3
    saved = ctx.saved_tensors
    in_place = all(type(g) is Tensor for g in saved) and not _graph_is_kept()
    scaled = (g.mul_(grad_loss) if in_place else g * grad_loss for g in saved)
    return [g.to(ctx.dtype) if need else None for g, need in zip(scaled, needed, strict=True)]


def _graph_is_kept() -> bool:
    return torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()


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


def check_options(function: str, logit_scale: float, logit_softcap: float | None, chunk_size: int) -> None:
    """Raises unless the options of a head and its chunks are in range."""
    for option, value in (("logit_scale", logit_scale), ("logit_softcap", logit_softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{function}: {option} must be above 0 and finite, got {value}")
    if chunk_size < 1:
        raise ValueError(f"{function}: chunk_size must be at least 1, got {chunk_size}")
