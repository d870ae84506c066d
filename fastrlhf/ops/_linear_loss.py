"""What losses on a linear head share: their gradient is made in the forward, while the logits of a chunk exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrlhf.ops._check import computed_in
from fastrlhf.ops._linear import Gradients, Head, even_cuts, used_rows

MOVED_ROWS = 16  # rows of logits that are moved at a time


def loss_in_chunks(
    head: Head,
    targets: Tensor,
    temperature: Tensor,
    kept: Tensor,
    wanted: list[bool],
    groups: list[slice],
    upstream: Callable[[slice, Tensor, Tensor], list[Tensor | None]],
) -> tuple[Tensor, Tensor, Gradients]:
    """Returns logprobs and entropy (K,) of the rows of head in `kept` (K,), and the gradients of a loss on them.

    groups: slices of the K rows such that the loss is a sum over them. One of at most chunk_size rows takes three
        matrix products; of a larger one the logits are made again once its loss is known, which is a fourth
    upstream(rows, logprobs, entropy): the gradients of the loss in the logprobs and entropies of a group; not asked for
        where no gradient is wanted"""
    grads = Gradients.zeros(head, wanted, computed_in(head.hidden))
    temperature = head.temperatures(temperature)
    if kept.shape[0] < targets.shape[0]:
        head, targets, temperature = head.rows(kept), targets[kept], temperature[kept]
    results = [temperature.new_empty(kept.shape[0]) for _ in range(4)]
    logprobs, entropy, *_ = results
    saved = [targets, temperature, *results[1:]]
    group_cuts = [even_cuts(group.start, group.stop, head.chunk_size) for group in groups]
    buffer = head.buffer([rows for cuts in group_cuts for rows in cuts])
    with torch.autocast(targets.device.type, enabled=False):
        for group, cuts in zip(groups, group_cuts, strict=True):
            for rows in cuts:
                logits = head.rows(rows).logits(buffer)
                of_rows = torch.ops.fastrlhf.token_logprobs(logits, targets[rows], temperature[rows])
                for result, part in zip(results, of_rows, strict=True):
                    result[rows] = part
            if not any(wanted):
                continue
            given = upstream(group, logprobs[group], entropy[group])
            for rows in cuts:
                if len(cuts) > 1:
                    logits = head.rows(rows).logits(buffer)
                part = slice(rows.start - group.start, rows.stop - group.start)
                of_rows = [None if g is None else g[part] for g in given]
                _add_chunk(grads, head.rows(rows), logits, of_rows, [kept[rows], *(t[rows] for t in saved)])
    return logprobs, entropy, grads


def _add_chunk(grads: Gradients, head: Head, logits: Tensor, given: list[Tensor | None], rows: list[Tensor]) -> None:
    """Adds the gradient of a chunk, leaving out rows whose upstream gradient is 0: clipped, say, or of no advantage."""
    used = used_rows(*given)
    if used.shape[0] < logits.shape[0]:
        for start, block in enumerate(used.split(MOVED_ROWS)):  # the rows ahead are not overwritten, as `used` rises
            logits[start * MOVED_ROWS :][: block.shape[0]] = logits.index_select(0, block)
        logits = logits[: used.shape[0]]
        given = [None if g is None else g.index_select(0, used) for g in given]
        head, rows = head.rows(used), [t.index_select(0, used) for t in rows]
    index, *saved = rows
    if used.shape[0] > 0:
        head.turn_into_gradient(logits, given, saved)
        grads.add(head, logits, index)


def gradients_ref(loss_of: Callable[[Head], Tensor], head: Head, wanted: list[bool]) -> Gradients:
    """By autograd, what the references of losses return as gradients: those of loss_of(head)."""
    wide = computed_in(head.hidden)
    leaves: list[Any] = [None if t is None else t.detach().to(wide).requires_grad_() for t in head.tensors]
    with torch.enable_grad():
        loss = loss_of(Head(*leaves, *head[len(leaves) :]))
    chosen = [t for t, want in zip(leaves, wanted, strict=True) if want and t is not None]
    grads = iter(torch.autograd.grad(loss, chosen) if chosen else ())
    return Gradients(*(next(grads) if want else head.hidden.new_zeros(0, dtype=wide) for want in wanted))


def fake(num_stats: int) -> Callable[..., tuple[Tensor, ...]]:
    """The fake of an op that returns a loss, statistics if it has some, and the gradients."""

    def outputs(*args: Any) -> tuple[Tensor, ...]:
        head, (*_, wanted) = Head.split(args)
        wide, shapes = computed_in(head.hidden), [(), (num_stats,)] if num_stats else [()]
        return *(head.hidden.new_empty(s, dtype=wide) for s in shapes), *Gradients.zeros(head, wanted, wide)

    return outputs


def kept_rows(mask: Tensor | None, like: Tensor) -> Tensor:
    """The indices of the rows that count, (K,) int64 beside `like`."""
    return torch.arange(like.shape[0], device=like.device) if mask is None else mask.nonzero()[:, 0]


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The `setup_context` of an op that returns a loss, statistics if it has some, and last the gradients."""
    tensors = inputs[: len(Gradients._fields)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the gradients of gradients would be as large as the weight
    ctx.save_for_backward(*output[-len(tensors) :])
    ctx.dtypes = [None if t is None else t.dtype for t in tensors]
    ctx.num_constants = len(inputs) - len(tensors)


def scale_gradients(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """The `backward` of such an op: the saved gradients times that of the loss, rounded to the dtype of what they are
    for only now.

    They are scaled where they are unless the graph is kept for another backward, so that no second (V, D) exists."""
    saved: tuple[Tensor, ...] = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * (len(saved) + ctx.num_constants)
    if grad_loss is not None:
        in_place = all(type(g) is Tensor for g in saved) and not _graph_is_kept()
        for i, grad in enumerate(saved):
            if ctx.needs_input_grad[i]:
                grads[i] = (grad.mul_(grad_loss) if in_place else grad * grad_loss).to(ctx.dtypes[i])
    return tuple(grads)


def _graph_is_kept() -> bool:
    return torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
