"""linear_dpo_loss against DPO on full logits: forward and backward to hidden states and head.

    python -m benchmarks.ops.bench_linear_dpo_loss

Pairs of 256 rows fit in a chunk, which takes three matrix products; pairs of 1024 rows take four. Extra memory is the
peak beyond inputs, outputs and gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, compare, expect_close, peak_mib
from fastrlhf import linear_dpo_loss, linear_token_logprobs

NUM_ROWS, WIDTH, SIZE, BETA = 2048, 512, 32000, 0.1


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor, ref: Tensor) -> Tensor:
    logprobs = F.log_softmax(hidden @ weight.t(), -1).gather(1, targets[:, None])[:, 0]
    rewards = BETA * (logprobs - ref).view(cu_seqlens.shape[0] - 1, -1).sum(1)  # sequences are of one length here
    return -F.logsigmoid(rewards[::2] - rewards[1::2]).mean()


def ours(*inputs: Tensor) -> Tensor:
    return linear_dpo_loss(*inputs, beta=BETA)[0]


def add(report: Report, case: str, inputs: tuple[Tensor, ...]) -> None:
    leaves, losses = [t for t in inputs if t.requires_grad], {"fastrlhf": ours, "torch full logits": full_logits}
    functions = {name: lambda loss=loss: torch.autograd.grad(loss(*inputs), leaves) for name, loss in losses.items()}
    exact = functions["torch full logits"]()
    errors = {
        name: max(expect_close(name, *pair, rtol=1e-3, atol=1e-6) for pair in zip(function(), exact, strict=True))
        for name, function in functions.items()
    }
    outputs = sum(t.nbytes for t in leaves) / 2**20
    extra = {name: peak_mib(function) - outputs for name, function in functions.items()}
    timings = compare(functions, seconds=report.options.seconds, min_rounds=3)
    report.add(case, timings, extra_mib=extra, error=errors)


def main() -> None:
    report = Report("linear_dpo_loss")
    hidden, weight = torch.randn(NUM_ROWS, WIDTH, requires_grad=True), torch.randn(SIZE, WIDTH) * 0.05
    targets = torch.randint(SIZE, (NUM_ROWS,))
    with torch.no_grad():
        ref = linear_token_logprobs(hidden, weight, targets) + 0.1 * torch.randn(NUM_ROWS)
    weight.requires_grad_()
    for length in (128, 512):
        cu_seqlens = torch.arange(0, NUM_ROWS + 1, length, dtype=torch.int32)
        pairs = f"{NUM_ROWS // length // 2} pairs of {2 * length} rows"
        add(report, f"fwd+bwd, {pairs}, {WIDTH}x{SIZE} float32", (hidden, weight, targets, cu_seqlens, ref))
    report.finish()


if __name__ == "__main__":
    main()
