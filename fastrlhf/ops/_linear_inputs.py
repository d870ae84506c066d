"""What the public functions of the ops on a linear head share: the checks of their arguments; and their samples."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf.ops._check import FLOATS, computed_in, dtype_in, has_shape, indices_below, mask_of, readable, same_device
from fastrlhf.ops._linear import TILE, Head


def head_of(
    function: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: Any, *options: Any, suffix: str = ""
) -> Head:
    """The head of these arguments of a public function, DTensors gathered; raises unless they fit each other.

    options: logit_scale, logit_softcap, chunk_size, batch_invariant; suffix: what the names of tensors end in there"""
    a, b, lora_scale = _low_rank(function, f"lora{suffix}", lora)
    weight, bias, a, b = map(gathered, (weight, bias, a, b))
    tensors = dict(hidden=hidden, weight=weight, bias=bias, lora_a=a, lora_b=b)
    same_device(function, **{name + suffix: t for name, t in tensors.items()})
    dtype_in(function, f"hidden{suffix}", hidden, FLOATS)
    dtype_in(function, f"weight{suffix}", weight, (hidden.dtype,))
    has_shape(function, f"hidden{suffix}", hidden, (None, None), "(T, D)")
    has_shape(function, f"weight{suffix}", weight, (None, hidden.shape[1]), "(V, D)")
    if weight.shape[0] == 0:
        raise ValueError(f"{function}: weight{suffix} must have at least one row, got {tuple(weight.shape)}")
    if bias is not None:
        dtype_in(function, f"bias{suffix}", bias, (hidden.dtype,))
        has_shape(function, f"bias{suffix}", bias, weight.shape[:1], "(V,)")
    if a is not None and b is not None:
        for name, tensor in (("lora_a", a), ("lora_b", b)):
            dtype_in(function, name + suffix, tensor, tuple(dict.fromkeys((hidden.dtype, computed_in(hidden)))))
        has_shape(function, f"lora_a{suffix}", a, (None, hidden.shape[1]), "(r, D)")
        has_shape(function, f"lora_b{suffix}", b, (weight.shape[0], a.shape[0]), "(V, r)")
        if a.shape[0] == 0:
            raise ValueError(f"{function}: lora_a{suffix} must have at least one row, got {tuple(a.shape)}")
    _check_options(function, *options)
    return Head(hidden, weight, bias, a, b, lora_scale, *options)


def _check_options(function: str, scale: float, cap: float | None, chunk_size: int, batch_invariant: bool) -> None:
    for option, value in (("logit_scale", scale), ("logit_softcap", cap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{function}: {option} must be above 0 and finite, got {value}")
    if not isinstance(chunk_size, int):
        raise TypeError(f"{function}: chunk_size must be an integer, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"{function}: chunk_size must be at least 1, got {chunk_size}")
    if batch_invariant and chunk_size % TILE:
        raise ValueError(f"{function}: with batch_invariant chunk_size must be a multiple of {TILE}, got {chunk_size}")


def _low_rank(function: str, name: str, lora: Any) -> tuple[Tensor | None, Tensor | None, float]:
    """The fields of a head for lora = (a, b, scale), or for None; raises unless it is one of these."""
    if lora is None:
        return None, None, 1.0
    given = list(lora) if isinstance(lora, (tuple, list)) else [lora]
    kinds: list[Any] = [Tensor, Tensor, (int, float)]
    if len(given) != 3 or not all(isinstance(x, kind) for x, kind in zip(given, kinds, strict=True)):
        got = ", ".join(type(x).__name__ for x in given)
        raise TypeError(f"{function}: {name} must be (a, b, scale), two tensors and a number, got {got}")
    a, b, scale = given
    if not math.isfinite(scale):
        raise ValueError(f"{function}: the scale of {name} must be finite, got {scale}")
    return a, b, float(scale)


def check_targets(function: str, head: Head, targets: Tensor, mask: Tensor | None = None) -> None:
    """Raises unless targets are (T,) int64, in [0, V) where the mask is True, and the mask is (T,)."""
    same_device(function, hidden=head.hidden, targets=targets, mask=mask)
    dtype_in(function, "targets", targets, (torch.int64,))
    has_shape(function, "targets", targets, head.hidden.shape[:1], "(T,)")
    mask_of(function, mask, targets=targets)
    if mask is not None and readable(mask):
        targets = targets[mask]
    indices_below(function, "targets", targets, head.weight.shape[0])


def gathered(tensor: Any) -> Any:
    """The whole of a DTensor, differentiably; any other tensor, or None, as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wanted_gradients(*tensors: Tensor | None) -> list[bool]:
    """Which of these need a gradient, for ops that make it in the forward."""
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]


def rows_within(function: str, memory_budget: int, num_rows: int, bytes_of_row: int) -> int:
    """How many rows' logits a forward may keep for its backward."""
    if memory_budget < 0:
        raise ValueError(f"{function}: memory_budget must be a number of bytes, got {memory_budget}")
    return min(num_rows, int(memory_budget // bytes_of_row))


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Head, Tensor, Tensor]]:
    """Heads of every kind, with targets and temperatures for their rows."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    for num_rows, width, size, chunk_size in [(0, 3, 5, 2), (1, 1, 1, 4), (4, 3, 5, 3), (70, 33, 1200, 32)]:
        hidden, weight = (torch.randn(n, width, generator=generator) for n in (num_rows, size))
        hidden, weight = hidden.to(device, dtype), (weight * width**-0.5).to(device, dtype)
        targets = torch.randint(size, (num_rows,), generator=generator).to(device)
        one = torch.ones(1, device=device, dtype=wide)
        yield Head(hidden, weight, None, None, None, 1.0, 1.0, None, chunk_size, False), targets, one
        if num_rows <= 1:
            continue
        bias = torch.randn(size, generator=generator).to(device, dtype)
        temperature = torch.linspace(0.5, 2.0, num_rows).to(device, wide)
        yield Head(hidden, weight, bias, None, None, 1.0, 0.7, None, chunk_size, False), targets, temperature
        a, b = (torch.randn(shape, generator=generator) for shape in ((2, width), (size, 2)))
        a, b = (a * width**-0.5).to(device, dtype), b.to(device, dtype)
        yield Head(hidden, weight, bias, a, b, 0.5, 1.3, 2.5, chunk_size, True), targets, temperature
