"""linear_cross_entropy against torch's own, whole and in chunks: forward and backward to hidden states and head.

    python -m benchmarks.ops.bench_linear_cross_entropy

The goal is to be no slower than F.linear_cross_entropy at a tenth of its extra memory, which is the peak beyond inputs,
outputs and gradients."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, compare, expect_close, peak_mib
from fastrlhf import linear_cross_entropy, linear_token_logprobs

NUM_ROWS, WIDTH, SIZE = 2048, 512, 32000
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def losses() -> dict[str, Loss]:
    chunked = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
    return {
        "fastrlhf": linear_cross_entropy,
        "F.linear_cross_entropy": F.linear_cross_entropy,
        "F.linear_cross_entropy in chunks": lambda h, w, t: F.linear_cross_entropy(h, w, t, options=chunked),
        "linear_token_logprobs": lambda h, w, t: -linear_token_logprobs(h, w, t).mean(),
    }


def add(report: Report, case: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    functions = {
        name: lambda loss=loss: torch.autograd.grad(loss(hidden, weight, targets), leaves)
        for name, loss in losses().items()
    }
    results = {name: function() for name, function in functions.items()}
    errors = {
        name: expect_close(name, grads[0], results["F.linear_cross_entropy"][0], rtol=1e-3, atol=1e-9)
        for name, grads in results.items()
    }
    del results
    outputs = sum(t.nbytes for t in leaves) / 2**20
    extra = {name: peak_mib(function) - outputs for name, function in functions.items()}
    timings = compare(functions, seconds=report.options.seconds, min_rounds=3)
    report.add(case, timings, extra_mib=extra, error=errors)


def main() -> None:
    report = Report("linear_cross_entropy")
    hidden, weight = torch.randn(NUM_ROWS, WIDTH, requires_grad=True), torch.randn(SIZE, WIDTH) * 0.05
    targets, shape = torch.randint(SIZE, (NUM_ROWS,)), f"{NUM_ROWS}x{WIDTH}x{SIZE}"
    add(report, f"fwd+bwd, frozen head, {shape} float32", hidden, weight, targets)
    add(report, f"fwd+bwd, {shape} float32", hidden, weight.requires_grad_(), targets)
    report.finish()


if __name__ == "__main__":
    main()
