"""`fastrlhf check`: every op against its float64 reference on this machine, and how near it comes to its limits."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fastrlhf
from fastrlhf.ops._registry import BACKENDS, OPS, Op

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HELP = """fastrlhf check [--device DEVICE] [--matrix]

  Runs every op on its samples against the reference in float64, for each backend and dtype, then times each op at a
  training size in float32 (linear heads on CUDA: bfloat16). A line each: largest error relative to the largest result,
  milliseconds, GB/s or GFLOP/s, and per cent of what this machine copies or multiplies, which is measured first.

  --device DEVICE   cpu, cuda or cuda:N; cuda where there is a GPU, else cpu
  --matrix          only the table of op x backend x dtype

In the table, "ok" stands before the error, "exact" is what the others are compared with, "as float32" a dtype that the
op widens, "-" where the reference serves. A kernel may err by twice what plain torch errs in the same dtype, plus 8
roundings; the reference itself by 10000 roundings, at most 5 %. Exit status 1 if anything fails."""


def check(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Returns the lines of the command and whether all is well; raises ValueError for unknown options."""
    device, matrix_only, rest = "cuda" if torch.cuda.is_available() else "cpu", False, list(arguments)
    while rest:
        option = rest.pop(0)
        if option == "--matrix":
            matrix_only = True
        elif option.startswith("--device=") or (option == "--device" and rest):
            device = option.partition("=")[2] or rest.pop(0)
        else:
            raise ValueError(f"unknown option {option}, or --device without one")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device must be cpu, or cuda where there is a GPU, got {device}")
    with torch.no_grad():
        lines, good = matrix(device)
        return (lines if matrix_only else [*lines, "", *speeds(device)]), good


def matrix(device: str) -> tuple[list[str], bool]:
    """The table of op x backend x dtype, and whether nothing failed."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    lines = [f"{'op on ' + device:<24} {'backend':<10}" + "".join(f" {name:<14}" for name in names)]
    for name, op in OPS.items():
        native = BACKENDS[name][device.partition(":")[0]] == "native"
        for backend, function in (("reference", op.reference), ("native", op if native else None)):
            cells = ["-" if function is None else _cell(op, function, device, dtype) for dtype in DTYPES]
            lines.append(f"{name:<24} {backend:<10}" + "".join(f" {cell:<14}" for cell in cells))
    return lines, not any("FAIL" in line for line in lines)


def _cell(op: Op, function: Callable[..., Any], device: str, dtype: torch.dtype) -> str:
    worst = 0.0
    for args in op.samples(device, dtype):
        try:
            op.forward(*args)
        except TypeError:
            return "as float32"
        except Exception as failure:
            return f"FAIL {type(failure).__name__}"
        actual, exact, plain = function(*args), op.reference(*_double(args)), op.reference(*args)
        for a, e, p in zip(_flat(actual), _flat(exact), _flat(plain), strict=True):
            error, allowed = _error(a, e, p, torch.finfo(dtype).eps if function is op.reference else None)
            worst = max(worst, error)
            if not error <= allowed:
                return f"FAIL {error:.1e}"
    is_exact = function is op.reference and dtype == torch.float64
    return "exact" if is_exact else f"ok {worst:.1e}"


def _error(actual: Tensor, exact: Tensor, plain: Tensor, reference_eps: float | None) -> tuple[float, float]:
    """The largest error and the allowed one, relative to the largest exact result; inf where only one is finite."""
    if not actual.is_floating_point():
        return (0.0 if torch.equal(actual, plain) else torch.inf), 0.0
    eps, finite = torch.finfo(actual.dtype).eps, exact.isfinite() & plain.isfinite()
    if actual.shape != exact.shape or bool((finite != (actual.isfinite() & finite)).any()):
        return torch.inf, 0.0
    if not bool(finite.any()):
        return 0.0, 0.0
    scale = max(1.0, exact[finite].abs().max().item())
    error, other = ((x.double() - exact)[finite].abs().max().item() / scale for x in (actual, plain))
    return error, 2 * other + 8 * eps if reference_eps is None else min(1e4 * reference_eps, 0.05)


def _double(args: Sequence[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def _flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    return [t for part in parts for t in _flat(part)]


def _limits(device: str, head: torch.dtype) -> tuple[float, float]:
    """GB/s, read and written, of the fastest copy, and GFLOP/s of the fastest product."""
    on_gpu = device != "cpu"
    side = 8192 if on_gpu else 2048
    source, square = torch.ones(2**29 if on_gpu else 2**26, device=device), torch.ones(side, side, device=device)
    target, square = source.clone(), square.to(head)
    copies, products = _times(lambda: target.copy_(source), device), _times(lambda: square @ square, device)
    return 2 * source.nbytes / min(copies) / 1e9, 2 * side**3 / min(products) / 1e9


def speeds(device: str) -> list[str]:
    """The lines of the timings."""
    head = torch.float32 if device == "cpu" else torch.bfloat16
    copy, product = _limits(device, head)
    lines = [f"this machine copies {copy:.1f} GB/s (read + write) and multiplies {product:.0f} GFLOP/s ({head})", ""]
    lines += [f"{'op':<24} {'ms':>9} {'rate':>17} {'of limit':>9}"]
    for name, function, args, flops in _workloads(device, head):
        seconds = statistics.median(_times(functools.partial(function, *args), device))
        if flops:
            rate, limit, unit = flops / seconds / 1e9, product, "GFLOP/s"
        else:
            moved = [*(a for a in args if isinstance(a, Tensor)), *_flat(function(*args))]
            rate, limit, unit = sum(t.nbytes for t in moved) / seconds / 1e9, copy, "GB/s"
        lines.append(f"{name:<24} {seconds * 1e3:>9.3f} {rate:>9.1f} {unit:<7} {100 * rate / limit:>7.1f} %")
    return lines


def _times(function: Callable[[], Any], device: str) -> list[float]:
    """Seconds of each call, over a third of a second and at least five calls after the first."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 6 or time.perf_counter() - begin < 0.3:
        start = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def _workloads(device: str, head: torch.dtype) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...], int]]:
    """(op, function, arguments, floating-point operations, or 0 for an op that waits for memory)."""
    on_gpu = device != "cpu"
    n, rows, size = (2**24, 8192, 32000) if on_gpu else (2**23, 512, 32000)
    a, b, c = (0.1 * torch.randn(n, device=device) for _ in range(3))
    cu_seqlens = torch.arange(0, n + 1, 1024, dtype=torch.int32, device=device)
    scores = a[: n // 32]
    of_groups = torch.arange(0, len(scores) + 1, 8, dtype=torch.int32, device=device)
    yield "approx_kl", fastrlhf.approx_kl, (a, b), 0
    yield "discounted_returns", fastrlhf.discounted_returns, (a, cu_seqlens), 0
    yield "gae", fastrlhf.gae, (a, b, cu_seqlens), 0
    yield "group_advantages", fastrlhf.group_advantages, (scores, of_groups), 0
    yield "masked_moments", OPS["masked_moments"], (a, None), 0
    yield "masked_whiten", fastrlhf.masked_whiten, (a,), 0
    yield "pairwise_reward_loss", fastrlhf.pairwise_reward_loss, (scores, b[: len(scores)]), 0
    yield "ppo_advantages", _ppo_advantages, (a[: n // 1024], a, b, c, cu_seqlens), 0
    yield "ppo_policy_loss", fastrlhf.ppo_policy_loss, (a, b, c), 0
    yield "ppo_sequence_loss", _ppo_sequence_loss, (a, b, c, cu_seqlens), 0
    yield "ranking_loss", fastrlhf.ranking_loss, (scores, of_groups), 0
    yield "value_loss", fastrlhf.value_loss, (a, b, c), 0
    logits, targets = torch.randn(rows, size, device=device), torch.randint(size, (rows,), device=device)
    yield "token_logprobs", fastrlhf.token_logprobs, (logits, targets), 0
    yield "sample_tokens", fastrlhf.sample_tokens, (logits,), 0
    yield "kl_divergence", fastrlhf.kl_divergence, (logits, logits.flip(0)), 0
    del logits
    query, caches = torch.randn(16, 16, 64, device=device), torch.randn(2, 16, 4, 1024, 64, device=device)
    lengths = torch.full((16,), 1024, dtype=torch.int32, device=device)
    yield "decode_attention", fastrlhf.decode_attention, (query, *caches, lengths), 0
    width = 4096 if on_gpu else 512
    rows, size = (8192, 32000) if on_gpu else (256, 8192)
    hidden, weight = torch.randn(rows, width, device=device, dtype=head), torch.randn(size, width, device=device)
    args = hidden, (weight * width**-0.5).to(head), targets[:rows] % size
    product = 2 * rows * width * size
    yield "linear_token_logprobs", fastrlhf.linear_token_logprobs, args, product
    yield "linear_cross_entropy", fastrlhf.linear_cross_entropy, args, product
    yield "linear_kl_divergence", fastrlhf.linear_kl_divergence, (*args[:2], hidden.flip(0), args[1]), 2 * product
    yield "linear_ppo_loss", fastrlhf.linear_ppo_loss, (*args, a[:rows] - 9, b[:rows]), product
    ends = torch.tensor([0, rows // 2, rows], dtype=torch.int32, device=device)
    yield "linear_dpo_loss", fastrlhf.linear_dpo_loss, (*args, ends, a[:rows] - 9), product


def _ppo_advantages(*args: Tensor) -> Any:
    return fastrlhf.ppo_advantages(*args, kl_coef=0.05)


def _ppo_sequence_loss(*args: Tensor) -> Any:
    return fastrlhf.ppo_policy_loss(*args[:3], ratio="sequence", cu_seqlens=args[3])
