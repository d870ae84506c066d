"""`fastrlhf check`: every op against its float64 reference on this machine, and how near it comes to its limits.

The table of op x backend x dtype has the largest error of an op on its samples, relative to the largest result: "ok"
stands before it, "exact" is what the others are compared with, "as float32" a dtype that the op widens, "-" where the
reference serves. A kernel may err by twice what plain torch errs in the same dtype, plus 8 roundings; the reference
itself by 10000 roundings, at most 5 %. Then each op is timed at a training size in float32 (linear heads on CUDA:
bfloat16): error, milliseconds, GB/s or GFLOP/s, and per cent of what this machine copies or multiplies.

An op needs nothing here: small arguments are its samples, large ones are made from the names in its schema.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.errors import MachineError, UserError
from fastrlhf.ops._registry import BACKENDS, OPS, Op
from fastrlhf.settings.info import CheckConfig

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# rows of logits, vocabulary, width of the head, tokens
SIZES = {"cpu": (512, 32000, 512, 2**22), "cuda": (8192, 32000, 4096, 2**22)}


class Line(NamedTuple):
    """A line of the command. num_failed: results in it that are wrong, which FAIL marks"""

    text: str
    num_failed: int = 0


def check(config: CheckConfig) -> Iterator[str]:
    """Yields what the command prints. Raises: UserError for a device that is not there; MachineError at the end when a
    result is wrong."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device must be cpu, or cuda where there is a GPU, got {device}")
    num_failed = 0
    with torch.no_grad():
        for text, failed in chain(matrix(device), () if config.matrix else speeds(device)):
            yield text
            num_failed += failed
    if num_failed:
        raise MachineError(f"{num_failed} results are wrong; FAIL stands at each")


def matrix(device: str) -> Iterator[Line]:
    """The table of op x backend x dtype."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    yield Line(f"{'op on ' + device:<24} {'backend':<10}" + "".join(f" {name:<14}" for name in names))
    for name, op in OPS.items():
        native = BACKENDS[name][device.partition(":")[0]] == "native"
        for backend, function in (("reference", op.reference), ("native", op if native else None)):
            cells = [Line("-") if function is None else _cell(op, function, device, dtype) for dtype in DTYPES]
            text = f"{name:<24} {backend:<10}" + "".join(f" {cell.text:<14}" for cell in cells)
            yield Line(text, sum(cell.num_failed for cell in cells))


def _cell(op: Op, function: Callable[..., Any], device: str, dtype: torch.dtype) -> Line:
    worst = 0.0
    for args in op.samples(device, dtype):
        try:
            op.forward(*args)
        except Exception as failure:
            name = str(dtype).removeprefix("torch.")
            refused = isinstance(failure, TypeError) and str(failure).endswith(f"got {name}")
            is_widened = refused and dtype.itemsize == 2
            return Line("as float32") if is_widened else Line(f"FAIL {type(failure).__name__}", 1)
        actual, exact, plain = function(*args), op.reference(*_double(args)), op.reference(*args)
        for a, e, p in zip(_flat(actual), _flat(exact), _flat(plain), strict=True):
            error, allowed = _error(a, e, p, torch.finfo(dtype).eps if function is op.reference else None)
            worst = max(worst, error)
            if not error <= allowed:
                return Line(f"FAIL {error:.1e}", 1)
    is_exact = function is op.reference and dtype == torch.float64
    return Line("exact" if is_exact else f"ok {worst:.1e}")


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
    near = 32 if actual.dtype == torch.float64 else 8  # in float64 the reference rounds as we do
    return error, 2 * other + near * eps if reference_eps is None else min(1e4 * reference_eps, 0.05)


def _of_equal_draws(outputs: list[Tensor], exact: list[Tensor], plain: list[Tensor]) -> list[list[Tensor]]:
    """The same without the rows whose integers differ, if these are at most one in a thousand: of many random numbers
    some fall so near the border of two tokens that rounding decides."""
    equal = [a == p for a, p in zip(outputs, plain, strict=True) if a.dtype in (torch.int32, torch.int64)]
    same = torch.stack(equal).all(0) if equal else torch.zeros(1)
    if same.float().mean() < 0.999:
        return [outputs, exact, plain]
    return [[t[same] for t in tensors] for tensors in (outputs, exact, plain)]


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
    # random numbers, as a GPU multiplies equal ones faster
    source, square = torch.ones(2**29 if on_gpu else 2**26, device=device), torch.randn(side, side, device=device)
    target, square = source.clone(), square.to(head)
    copies, products = _times(lambda: target.copy_(source), device), _times(lambda: square @ square, device)
    return 2 * source.nbytes / min(copies) / 1e9, 2 * side**3 / min(products) / 1e9


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


def speeds(device: str) -> Iterator[Line]:
    """The lines of the timings, each with its error."""
    head = torch.float32 if device == "cpu" else torch.bfloat16
    copy, product = _limits(device, head)
    text = f"\nthis machine copies {copy:.1f} GB/s (read + write) and multiplies {product:.0f} GFLOP/s ({head})"
    yield Line(text)
    yield Line(f"\n{'op':<24} {'error':>8} {'ms':>10} {'rate':>17} {'of limit':>9}")
    for name, op in OPS.items():
        args = large_case(op, device, head if "weight" in " ".join(op.parameters) else torch.float32)
        outputs = [output.clone() for output in _flat(op(*args))]
        exact, plain = _flat(op.reference(*_double(args))), _flat(op.reference(*args))
        compared = zip(*_of_equal_draws(outputs, exact, plain), strict=True)
        errors = [_error(a, e, p, None) for a, e, p in compared]
        failed = not all(error <= allowed for error, allowed in errors)
        del exact, plain
        seconds = statistics.median(_times(functools.partial(op, *args), device))
        work, unit = _work(op, args, outputs)
        rate, limit = work / seconds / 1e9, copy if unit == "GB/s" else product
        shown = f"{rate:>9.1f} {unit:<7} {100 * rate / limit:>7.1f} %{' FAIL' * failed}"
        yield Line(f"{name:<24} {max(error for error, _ in errors):>8.1e} {seconds * 1e3:>10.3f} {shown}", failed)


def _work(op: Op, args: Sequence[Any], outputs: Sequence[Tensor]) -> tuple[int, str]:
    """What an op must do at least: the operations of its matrix products, or each byte read or written once."""
    named = {name: a for name, a in zip(op.parameters, args, strict=True) if isinstance(a, Tensor)}
    heads = [a for name, a in named.items() if name.startswith("weight") and a.ndim == 2]
    if not heads:
        return sum(t.nbytes for t in (*named.values(), *outputs)), "GB/s"
    hidden = args[0]
    gradients = sum(output.shape in (hidden.shape, heads[0].shape) for output in outputs)
    return 2 * hidden.shape[0] * heads[0].numel() * (len(heads) + gradients), "GFLOP/s"


def large_case(op: Op, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of a training size: tensors made by their names in the schema, the rest as in the op's first sample."""
    generator = torch.Generator(device).manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device=device)
    names, (rows, size, width, num_tokens) = set(op.parameters), SIZES[device.partition(":")[0]]
    of_rows, of_groups = any(n.startswith(("logits", "hidden")) for n in names), bool(names & {"cu_groups", "chosen"})
    length = rows if of_rows else 2**13 if of_groups else num_tokens
    bounds = torch.arange(0, length + 1, 8 if of_groups else 256, dtype=torch.int32, device=device)
    makers: dict[str, Callable[[], Tensor]] = {
        "logits": lambda: 3 * random(rows, size),
        "hidden": lambda: random(rows, width).to(dtype),
        "weight": lambda: (random(size, width) / 1000).to(dtype),
        "targets": lambda: torch.randint(size, (rows,), generator=generator, device=device),
        "cu": lambda: bounds,
        "temperature": lambda: torch.ones(1, device=device),
        "query": lambda: random(64, 8, 64),
        "key": lambda: random(64, 4, 512, 64),
        "value": lambda: random(64, 4, 512, 64),
        "lengths": lambda: torch.full((64,), 512, dtype=torch.int32, device=device),
        "seeds": lambda: torch.arange(rows, device=device),
        "positions": lambda: torch.arange(rows, device=device),
        "scores": lambda: random(len(bounds) - 1 if "cu_seqlens" in names else length),
        # near each other, and with the small weights above near those of the head, so that ratios are about 1
        "logprobs": lambda: random(length) / 20 - math.log(size),
    }

    makers |= {
        "packed_attention": {
            "query": lambda: random(2**13, 8, 64),
            "key": lambda: random(2**13, 4, 64),
            "value": lambda: random(2**13, 4, 64),
            "cu": lambda: bounds[: 2**13 // 256 + 1],
        },
        "rms_norm": {"hidden": lambda: random(2**13, 512), "weight": lambda: random(512)},
        "rotary": {
            "states": lambda: random(2**13, 8, 64),
            "cos": lambda: random(2**13, 64),
            "sin": lambda: random(2**13, 64),
        },
        "thin_linear": {"rows": lambda: random(64, width)},
    }.get(op.name, {})

    def make(argument: Any, given: Any) -> Any:
        if not isinstance(given, Tensor):
            return {"chunk_size": 512}.get(argument.name, given)
        if argument.type.kind() == "OptionalType":
            return None
        kind = "logprobs" if argument.name.endswith("logprobs") else argument.name
        first = kind.partition("_")[0]
        return makers.get(kind, makers.get(first, lambda: random(length)))()

    arguments = op.forward._schema.arguments  # type: ignore[attr-defined]
    first = next(iter(op.samples(device, torch.float32)))
    return tuple(make(argument, given) for argument, given in zip(arguments, first, strict=True))
