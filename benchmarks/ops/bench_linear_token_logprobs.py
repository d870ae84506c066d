"""linear_token_logprobs against full logits and torch's own fused loss.

    python -m benchmarks.ops.bench_linear_token_logprobs

Matrix products take most of the time whoever makes them, so the column to look at is the memory."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Prepared, Report, compare, expect_close, peak_mib
from fastrlhf import linear_token_logprobs

NUM_ROWS, WIDTH, SIZE = 2048, 512, 32000
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(**options: bool | int) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        outputs = linear_token_logprobs(hidden, weight, targets, **options)
        return outputs[1].mean() - outputs[0].mean() if isinstance(outputs, tuple) else -outputs.mean()

    return loss


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (
        -F.log_softmax((hidden @ weight.t()), -1, dtype=torch.promote_types(hidden.dtype, torch.float32))
        .gather(1, targets[:, None])
        .mean()
    )


def full_logits_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    table = F.log_softmax((hidden @ weight.t()), -1, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return -(table.exp() * table).sum(-1).mean() - table.gather(1, targets[:, None]).mean()


def torch_losses() -> dict[str, Loss]:
    """torch's fused loss, whole and in chunks, where this torch has it."""
    if not hasattr(F, "linear_cross_entropy"):
        return {}
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
    return {
        "F.linear_cross_entropy": F.linear_cross_entropy,
        "F.linear_cross_entropy in chunks": lambda h, w, t: F.linear_cross_entropy(h, w, t, options=options),
    }


def with_gradient(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> Prepared:
    """Forward and backward to whichever of the two needs a gradient."""
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    return Prepared(tuple, lambda: torch.autograd.grad(loss(hidden, weight, targets), leaves))


def add(report: Report, case: str, losses: dict[str, Loss], inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Times the losses, with their gradient where an input needs one."""
    needs_grad = any(t.requires_grad for t in inputs)
    with torch.no_grad():
        hidden, weight, targets = inputs
        exact = full_logits_entropy if "entropy" in case else full_logits
        expected = exact(hidden.double(), weight.double(), targets)
        errors = {name: expect_close(name, loss(*inputs), expected, rtol=1e-3) for name, loss in losses.items()}
    functions = {
        name: with_gradient(loss, *inputs) if needs_grad else lambda loss=loss: loss(*inputs)
        for name, loss in losses.items()
    }
    memory = {name: peak_mib(function) for name, function in functions.items()}
    timings = compare(functions, seconds=report.options.seconds, min_rounds=3)
    report.add(case, timings, peak_mib=memory, error=errors)


def main() -> None:
    report = Report("linear_token_logprobs")
    hidden, weight = torch.randn(NUM_ROWS, WIDTH), torch.randn(SIZE, WIDTH) * 0.05
    targets = torch.randint(SIZE, (NUM_ROWS,))
    inputs, shape = (hidden, weight, targets), f"{NUM_ROWS}x{WIDTH}x{SIZE}"
    plain = {"fastrlhf": ours(), "torch full logits": full_logits}
    both = {"fastrlhf": ours(return_entropy=True), "torch full logits": full_logits_entropy}
    add(report, f"forward, {shape} float32", plain, inputs)
    add(report, f"forward with entropy, {shape} float32", both, inputs)
    hidden.requires_grad_()
    add(report, f"fwd+bwd, frozen head, {shape} float32", plain, inputs)
    add(report, f"fwd+bwd with entropy, frozen head, {shape} float32", both, inputs)
    weight.requires_grad_()
    kept = {"fastrlhf": ours(), "fastrlhf, gradients kept": ours(memory_budget=NUM_ROWS * SIZE * 4)}
    add(report, f"fwd+bwd, {shape} float32", kept | plain | torch_losses(), inputs)
    both["fastrlhf, logits kept"] = ours(return_entropy=True, memory_budget=NUM_ROWS * SIZE * 4)
    add(report, f"fwd+bwd with entropy, {shape} float32", both, inputs)
    half = (hidden.detach()[:512].bfloat16(), weight.detach().bfloat16(), targets[:512])
    shape = f"512x{WIDTH}x{SIZE} bfloat16"
    add(report, f"forward, {shape}", plain, half)
    half[0].requires_grad_()
    add(report, f"fwd+bwd, frozen head, {shape}", plain, half)
    half[1].requires_grad_()
    add(report, f"fwd+bwd, {shape}", kept | plain, half)
    report.finish()


if __name__ == "__main__":
    main()
