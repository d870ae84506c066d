"""linear_kl_divergence against plain torch on whole logits: python -m benchmarks.ops.bench_linear_kl_divergence"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, compare, expect_close, peak_mib
from fastrlhf import linear_kl_divergence

NUM_ROWS, WIDTH, SIZE = 1024, 512, 32000
Divergence = Callable[[list[Tensor]], Tensor]


def by_torch(tensors: list[Tensor]) -> Tensor:
    hidden_p, weight_p, hidden_q, weight_q = tensors
    log_p, log_q = F.log_softmax(hidden_p @ weight_p.t(), -1), F.log_softmax(hidden_q @ weight_q.t(), -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


DIVERGENCES: dict[str, Divergence] = {
    "fastrlhf": lambda tensors: linear_kl_divergence(*tensors),
    "fastrlhf, logits kept": lambda tensors: linear_kl_divergence(*tensors, memory_budget=2**40),
    "torch": by_torch,
}


def add(report: Report, tensors: list[Tensor], sides: list[Tensor], case: str) -> None:
    """sides: of the tensors, those that get a gradient; without one only the divergence is timed."""
    divergences = {name: f for name, f in DIVERGENCES.items() if sides or name != "fastrlhf, logits kept"}
    few = [t[:4].detach() if i % 2 == 0 else t.detach() for i, t in enumerate(tensors)]
    exact = by_torch([t.double() for t in few])
    errors = {name: expect_close(name, f(few), exact) for name, f in divergences.items()}

    def call(divergence: Divergence) -> tuple[Tensor, ...]:
        outputs = divergence(tensors)
        return torch.autograd.grad(outputs.sum(), sides) if sides else (outputs,)

    functions = {name: lambda f=f: call(f) for name, f in divergences.items()}
    memory = {name: peak_mib(function) for name, function in functions.items()}
    report.add(case, compare(functions, seconds=report.options.seconds, min_rounds=3), peak_mib=memory, error=errors)


def main() -> None:
    report = Report("linear_kl_divergence")
    shape = f"{NUM_ROWS}x{WIDTH}x{SIZE} float32"
    tensors = [torch.randn(n, WIDTH) * s for n, s in ((NUM_ROWS, 1.0), (SIZE, 0.05)) * 2]
    add(report, tensors, [], f"forward, {shape}")
    for indices, what in (((0,), "hidden_p"), ((0, 1), "p"), ((0, 1, 2, 3), "both")):
        leaves = [t.detach().requires_grad_(i in indices) for i, t in enumerate(tensors)]
        add(report, leaves, [leaves[i] for i in indices], f"forward and backward to {what}, {shape}")
    report.finish()


if __name__ == "__main__":
    main()
