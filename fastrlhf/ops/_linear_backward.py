"""The gradient of `linear_token_logprobs`, from what its forward kept and from logits that are made again."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf.ops._linear import Gradients, Head, even_cuts, used_rows

# What a forward may keep of a row. The latter two are for the log-probability alone, times `units`, and then a backward
# need only scale them; they cannot serve the entropy, whose upstream gradient is another number.
LOGITS = "logits"  # (V,) in float32, or float64
GRADIENT = "gradient"  # (V,) that in x = hidden weight^T + bias + that of lora, in the dtype of hidden
PRODUCT = "product"  # (D,) that in hidden, where nothing else needs a gradient; in float32, so as to be rounded once


def units(head: Head, temperature: Tensor) -> Tensor:
    """(T,) the upstream gradients with which gradients are kept.

    No |d logprob / d x| is above scale / temperature, so none that is kept above 2^15, and float16 holds the gradients
    of tokens of probability 2^-29 to its full precision."""
    return (temperature * (2**15 / head.scale)).expand(head.hidden.shape[0])


def keep(kind: str, head: Head, logits: Tensor, unit: Tensor, rows: list[Tensor], out: Tensor) -> None:
    """Writes what is kept of rows to `out`; but for LOGITS overwrites the logits. rows: as `turn_into_gradient`'s."""
    if kind != LOGITS:
        head.turn_into_gradient(logits, [unit, None], rows)
        if kind == PRODUCT:
            logits = head.hidden_gradient(logits, head.low_gradient(logits))
    out.copy_(logits)


def scaled(products: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of hidden from its PRODUCT; exactly 0 where the factor is 0."""
    return (products * factor[:, None]).masked_fill_((factor == 0)[:, None], 0).to(dtype)


def by_rows(
    head: Head,
    upstream: list[Tensor | None],
    rows: list[Tensor],
    kept: Tensor,
    factor: Tensor | None,
    wanted: list[bool],
) -> Gradients:
    """The gradients of the head's tensors, a chunk of rows at a time; rows whose upstream gradient is 0 left out.

    upstream: gradients of logprobs and entropy; rows: targets, temperature, entropy, highest and log_sum
    kept: GRADIENT of the first rows, to be multiplied by factor (T,); without a factor their LOGITS"""
    used = used_rows(*upstream)
    num_used, num_kept = used.shape[0], int((used < kept.shape[0]).sum())
    grads = Gradients.zeros(head, wanted, head.hidden.dtype)
    if num_used < head.hidden.shape[0]:
        head, rows = head.rows(used), [t.index_select(0, used) for t in rows]
        *upstream, factor = (None if t is None else t.index_select(0, used) for t in (*upstream, factor))
    cuts = even_cuts(0, num_kept, head.chunk_size) + even_cuts(num_kept, num_used, head.chunk_size)
    buffer = head.buffer(cuts)
    for cut in cuts:
        chunk, tile = head.rows(cut), buffer[: cut.stop - cut.start]
        if cut.start >= num_kept:
            tile = chunk.logits(buffer)
        elif kept.dtype == buffer.dtype:
            torch.index_select(kept, 0, used[cut], out=tile)
        else:
            tile.copy_(kept.index_select(0, used[cut]))
        if cut.start < num_kept and factor is not None:
            tile.mul_(factor[cut][:, None])
        else:
            chunk.turn_into_gradient(tile, [None if t is None else t[cut] for t in upstream], [t[cut] for t in rows])
        grads.add(chunk, tile, used[cut])
    return grads
