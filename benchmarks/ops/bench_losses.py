"""The losses, whitening and approx_kl against plain torch and torch.compile: python -m benchmarks.ops.bench_losses

Each side computes the loss, the same statistics and, in the second table of a loss, the gradient. Where verl can be
imported, its losses, which have statistics of their own, stand beside them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrlhf
from benchmarks.harness import Report, compare, expect_close

try:
    from verl.trainer.ppo import core_algos as verl
except ImportError:
    verl = None

Function = Callable[..., tuple[Tensor, ...]]


def ppo_verl(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return verl.compute_policy_loss(old_logprobs, logprobs, advantages, mask, cliprange=0.2)


def value_verl(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return verl.compute_value_loss(values, returns, old_values, mask, 0.2)


def ppo_torch(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    count = mask.sum()
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    loss = torch.where(mask, torch.maximum(plain, clipped), 0).sum() / count
    with torch.no_grad():
        stats = [((clipped > plain) & mask), torch.where(mask, log_ratio.expm1() - log_ratio, 0), ratio * mask]
        extremes = torch.where(mask, ratio, -torch.inf).max(), torch.where(mask, ratio, torch.inf).min()
        return loss, *(x.sum() / count for x in stats), *extremes


def ppo_ours(*args: Tensor) -> tuple[Tensor, ...]:
    loss, stats = fastrlhf.ppo_policy_loss(*args)
    return loss, *stats.values()


def value_torch(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    count = mask.sum()
    bounded = values.clamp(old_values - 0.2, old_values + 0.2)
    plain, clipped = (values - returns).square(), (bounded - returns).square()
    loss = torch.where(mask, torch.maximum(plain, clipped), 0).sum() / (2 * count)
    with torch.no_grad():
        return loss, ((clipped > plain) & mask).sum() / count, torch.where(mask, plain, 0).sum() / count


def value_ours(*args: Tensor) -> tuple[Tensor, ...]:
    loss, stats = fastrlhf.value_loss(*args)
    return loss, *stats.values()


def pairwise_torch(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, ...]:
    loss = -F.logsigmoid(chosen - rejected).mean() + 0.01 * (chosen + rejected).square().mean()
    with torch.no_grad():
        accuracy = (chosen > rejected).float().mean() + 0.5 * (chosen == rejected).float().mean()
        return loss, accuracy, (chosen - rejected).mean(), chosen.mean(), rejected.mean()


def pairwise_ours(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, ...]:
    loss, stats = fastrlhf.pairwise_reward_loss(chosen, rejected, center_coef=0.01)
    return loss, *stats.values()


def ranking_torch(kind: str) -> Function:
    """For groups of one size without ties: theirs may be (G, K) operations, ours does not know that it could be."""

    def run(scores: Tensor) -> tuple[Tensor, ...]:
        first, second = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
        margins = scores[:, first] - scores[:, second]
        if kind == "pairwise":
            loss = -F.logsigmoid(margins).mean()
        else:
            loss = (scores.flip(1).logcumsumexp(1).flip(1) - scores).sum(1).mean()
        with torch.no_grad():
            return loss, (0.5 * margins.sign() + 0.5).mean(), margins.mean()

    return run


def ranking_ours(kind: str) -> Function:
    def run(scores: Tensor) -> tuple[Tensor, ...]:
        bounds = torch.arange(0, scores.numel() + 1, scores.shape[1], dtype=torch.int32)
        loss, stats = fastrlhf.ranking_loss(scores.flatten(), bounds, kind=kind)
        return loss, *stats.values()

    return run


def whiten_ours(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return (fastrlhf.masked_whiten(x, mask),)


def whiten_torch(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    count = mask.sum()
    mean = torch.where(mask, x, 0).sum() / count
    variance = torch.where(mask, (x - mean).square(), 0).sum() / count
    return (torch.where(mask, (x - mean) * (variance + 1e-8).rsqrt(), 0),)


def k3_ours(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, ...]:
    return (fastrlhf.approx_kl(logprobs, ref_logprobs, estimator="k3"),)


def k3_torch(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, ...]:
    r = ref_logprobs - logprobs
    return (r.exp() - 1 - r,)


def with_gradient(function: Function) -> Function:
    """The function's outputs and the gradient of the first with respect to the first argument."""

    def run(first: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        leaf = first.detach().requires_grad_()
        loss, *stats = function(leaf, *rest)
        return torch.autograd.grad(loss, leaf)[0], *stats

    return run


def table(
    report: Report,
    case: str,
    ours: Function,
    theirs: Function,
    args: tuple[Tensor, ...],
    grad: bool,
    peers: dict[str, Function] | None = None,
) -> None:
    """Times ours against theirs, eager and compiled, and against peers, of whom the first output alone is checked."""
    functions = {"fastrlhf": ours, "torch": theirs, "torch.compile": torch.compile(theirs), **(peers or {})}
    wrap: Callable[[Function], Function] = with_gradient if grad else lambda f: f
    exact = wrap(theirs)(*(a.double() if a.is_floating_point() else a for a in args))
    errors, calls = {}, {}
    for name, function in functions.items():
        run = wrap(function)
        checked = 1 if name in (peers or {}) else len(exact)
        pairs = list(zip(run(*args)[:checked], exact[:checked], strict=True))
        errors[name] = max(expect_close(name, a, e, rtol=1e-4, atol=1e-4) for a, e in pairs)
        calls[name] = lambda run=run: run(*args)
    report.add(case, compare(calls, seconds=report.options.seconds), error=errors)


def tokens(report: Report, shape: str) -> None:
    size = [int(length) for length in shape.split("x")]
    old, step, other = torch.randn(size) - 3, 0.2 * torch.randn(size), torch.randn(size)
    mask = torch.rand(size) < 0.9
    peers = ({"verl": ppo_verl}, {"verl": value_verl}) if verl else ({}, {})
    for grad in (False, True):
        what = f"{shape} tokens, {'forward + backward' if grad else 'forward'}"
        args = old + step, old, other, mask
        table(report, f"ppo_policy_loss, {what}", ppo_ours, ppo_torch, args, grad, peers[0])
        table(report, f"value_loss, {what}", value_ours, value_torch, args, grad, peers[1])
    table(report, f"masked_whiten, {shape} tokens", whiten_ours, whiten_torch, (other, mask), False)
    table(report, f"approx_kl k3, {shape} tokens", k3_ours, k3_torch, (old + step, old), False)


def pairs(report: Report) -> None:
    for grad in (False, True):
        what = "forward + backward" if grad else "forward"
        for size in (16, 64, 4096, 65536):
            args = torch.randn(size), torch.randn(size)
            table(report, f"pairwise_reward_loss, {size} pairs, {what}", pairwise_ours, pairwise_torch, args, grad)
        for kind in ("plackett_luce", "pairwise"):
            case = f"ranking_loss {kind}, 64 groups of 8, {what}"
            table(report, case, ranking_ours(kind), ranking_torch(kind), (torch.randn(64, 8),), grad)


def main() -> None:
    shapes = ["16", "4096", "64x1024", "1048576", "pairs"]
    options = {"nargs": "*", "default": shapes, "choices": shapes, "help": "shapes of the tokens to time, or pairs"}
    report = Report("losses", more={"--cases": options})
    for case in report.options.cases:
        if case == "pairs":
            pairs(report)
        else:
            tokens(report, case)
    report.finish()


if __name__ == "__main__":
    main()
