"""kl_divergence against plain torch: python -m benchmarks.ops.bench_kl_divergence"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, compare, expect_close, peak_mib
from fastrlhf import kl_divergence

SHAPES = [(512, 32000), (64, 128256), (4096, 512), (8, 50)]
Divergence = Callable[[Tensor, Tensor], Tensor]


def by_torch(kind: str) -> Divergence:
    def divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(logits_p, -1), F.log_softmax(logits_q, -1)
        if kind != "js":
            first, second = (log_p, log_q) if kind == "forward" else (log_q, log_p)
            return F.kl_div(second, first, log_target=True, reduction="none").sum(-1)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return sum(F.kl_div(log_m, log, log_target=True, reduction="none").sum(-1) for log in (log_p, log_q)) / 2

    return divergence


def ours(kind: str) -> Divergence:
    return lambda logits_p, logits_q: kl_divergence(logits_p, logits_q, kind=kind)


def add(report: Report, kind: str, logits: list[Tensor], sides: list[Tensor], case: str) -> None:
    """sides: of the logits, those that get a gradient; without one only the divergence is timed."""
    divergences = {"fastrlhf": ours(kind), "torch": by_torch(kind)}
    few = [x[:4].detach() for x in logits]
    exact = by_torch(kind)(*(x.double() for x in few))
    half = logits[0].dtype == torch.bfloat16  # of which torch rounds the terms
    errors = {
        name: expect_close(name, f(*few), exact, atol=0.1 if half and name == "torch" else 1e-5)
        for name, f in divergences.items()
    }

    def call(divergence: Divergence) -> tuple[Tensor, ...]:
        outputs = divergence(*logits)
        return torch.autograd.grad(outputs.sum(), sides) if sides else (outputs,)

    functions = {name: lambda f=f: call(f) for name, f in divergences.items()}
    memory = {name: peak_mib(function) for name, function in functions.items()}
    timings = compare(functions, seconds=report.options.seconds, min_rounds=3)
    report.add(case, timings, peak_mib=memory, error=errors)


def main() -> None:
    report = Report("kl_divergence")
    for shape in SHAPES:
        first = 2 * torch.randn(shape)
        logits, text = [first, first + torch.randn(shape)], "x".join(map(str, shape))
        for kind in ("forward", "js"):
            add(report, kind, logits, [], f"{kind}, {text} float32")
            if shape == SHAPES[0]:
                add(report, kind, [x.bfloat16() for x in logits], [], f"{kind}, {text} bfloat16")
        for kind in ("forward", "reverse", "js"):
            leaves = [logits[0].requires_grad_(), logits[1].requires_grad_()]
            add(report, kind, leaves, leaves[:1], f"{kind} and backward to p, {text} float32")
            add(report, kind, leaves, leaves, f"{kind} and backward to both, {text} float32")
            logits = [x.detach() for x in leaves]
    report.finish()


if __name__ == "__main__":
    main()
