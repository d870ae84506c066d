"""What the losses share whose forward pass makes the gradient: their leaves return (loss, stats, gradient of the first
argument, ...), so that the backward pass only scales."""

from typing import Any

from torch import Tensor


def keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The `setup_context` of such a loss."""
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)  # or every backward pass would be given zeros as large as the gradients
    ctx.save_for_backward(*others[1:])
    ctx.num_constants = len(inputs) - len(others) + 1


def scale_gradients(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """The `backward` of such a loss."""
    scaled: list[Tensor | None] = [None] * (len(ctx.saved_tensors) + ctx.num_constants)
    if grad_loss is not None:  # None stands for zeros
        for i, grad in enumerate(ctx.saved_tensors):
            scaled[i] = grad_loss * grad if ctx.needs_input_grad[i] else None
    return tuple(scaled)


def named(names: tuple[str, ...], stats: Tensor) -> dict[str, Tensor]:
    """The statistics by name."""
    return dict(zip(names, stats.unbind(), strict=True))
