"""token_logprobs against plain torch and TRL's own functions: python -m benchmarks.ops.bench_token_logprobs"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Prepared, Report, compare, expect_close
from fastrlhf import token_logprobs

try:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax
except ImportError:
    selective_log_softmax = None
    print("trl is not installed, so it is left out: pip install trl")

SHAPE = (8, 256, 32000)
Function = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def torch_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return (F.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1),)


def torch_both(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    table = F.log_softmax(logits, -1)
    return table.gather(-1, targets[..., None]).squeeze(-1), -(table.exp() * table).sum(-1)


def trl_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return (selective_log_softmax(logits, targets),)


def trl_both(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return selective_log_softmax(logits, targets), entropy_from_logits(logits)


def ours(**options: bool) -> Function:
    """TRL's functions take (B, L, V); ours takes the rows of it."""

    def function(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        outputs = token_logprobs(logits.flatten(0, -2), targets.flatten(), **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(output.view(targets.shape) for output in outputs)

    return function


def gradient(function: Function, source: Tensor, targets: Tensor, upstream: tuple[Tensor, ...]) -> Prepared:
    """Forward and backward to the logits, which an in-place backward consumes: they are made anew, untimed, no leaf."""
    leaf = source.clone().requires_grad_()

    def run(logits: Tensor) -> Tensor:
        outputs = function(logits, targets)
        return torch.autograd.grad(outputs, logits, upstream[: len(outputs)])[0]

    return Prepared(lambda: (leaf * 1,), run)


def time_forward(report: Report, functions: dict[str, Function], logits: Tensor, targets: Tensor, case: str) -> None:
    exact, errors = torch_both(logits[:1].double(), targets[:1]), {}
    for name, function in functions.items():
        outputs = function(logits[:1], targets[:1])
        # TRL's and torch's log-probabilities of half-precision logits are rounded to that precision
        atol = 1e-4 if name == "fastrlhf" or logits.dtype == torch.float32 else 0.1
        errors[name] = max(expect_close(name, o, e, atol=atol) for o, e in zip(outputs, exact, strict=False))
    with torch.no_grad():
        timings = compare(
            {n: lambda f=f: f(logits, targets) for n, f in functions.items()}, seconds=report.options.seconds
        )
    report.add(case, timings, error=errors)


def time_gradient(report: Report, functions: dict[str, Function], logits: Tensor, targets: Tensor, case: str) -> None:
    upstream = torch.randn(2, *targets.shape).unbind()
    small = {n: gradient(f, logits[:1], targets[:1], tuple(u[:1] for u in upstream)) for n, f in functions.items()}
    grads = {name: f.run(*f.prepare()) for name, f in small.items()}
    errors = {name: expect_close(name, grad, grads["torch"], rtol=1e-4, atol=1e-5) for name, grad in grads.items()}
    prepared = {n: gradient(f, logits, targets, upstream) for n, f in functions.items()}
    report.add(case, compare(prepared, seconds=report.options.seconds), difference_to_torch=errors)


def main() -> None:
    report = Report("token_logprobs")
    logits, targets = 3 * torch.randn(SHAPE), torch.randint(SHAPE[-1], SHAPE[:-1])
    shape = "x".join(map(str, SHAPE))
    for what, entropy, others in (
        ("logprobs", False, {"torch": torch_logprobs, "trl": trl_logprobs}),
        ("logprobs + entropy", True, {"torch": torch_both, "trl": trl_both}),
    ):
        if selective_log_softmax is None:
            del others["trl"]
        functions = {"fastrlhf": ours(return_entropy=entropy), **others}
        in_place = {"fastrlhf in place": ours(return_entropy=entropy, inplace_backward=True)}
        time_forward(report, functions, logits, targets, f"{what}, {shape} float32")
        time_gradient(report, in_place | functions, logits, targets, f"{what} and backward, {shape} float32")
        time_forward(report, functions, logits.bfloat16(), targets, f"{what}, {shape} bfloat16")
    report.finish()


if __name__ == "__main__":
    main()
