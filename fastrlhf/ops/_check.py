"""Checks shared by the ops: each raises ValueError or TypeError naming the function, the argument and what came.

Metadata checks always run. Value checks read the data, so they run on the CPU only (on CUDA they would stall the
device; kernels clamp their indices there) unless FASTRLHF_DEBUG=1.
"""

import math
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastrlhf import _cpu

HALF = (torch.float16, torch.bfloat16)
WIDE = (torch.float32, torch.float64)
FLOATS = (*WIDE, torch.bfloat16, torch.float16)
NAMES = {d: str(d).removeprefix("torch.") for d in FLOATS}
DEBUG = os.environ.get("FASTRLHF_DEBUG", "0") == "1"


def readable(tensor: Tensor) -> bool:
    """Whether value checks may read this tensor: real data, and on the CPU or in debug mode."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, Parameter):
        return False
    return tensor.is_cpu or (DEBUG and tensor.is_cuda)


def same_device(function: str, **tensors: Tensor | None) -> None:
    """Raises unless all tensors are on one device: a kernel takes addresses, and a mix would be a wild read."""
    if all([t is None or t.is_cpu for t in tensors.values()]):
        return
    found = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(found.values())) > 1:
        what = ", ".join(f"{name} on {device}" for name, device in found.items())
        raise ValueError(f"{function}: all tensors must be on one device, got {what}")


def dtype_in(function: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raises TypeError unless the dtype of `tensor` is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{function}: {name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def same_shape(function: str, **tensors: Tensor | None) -> None:
    """Raises unless all tensors have the same shape."""
    found = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len(set(found.values())) > 1:
        what = " and ".join(f"{name} {shape}" for name, shape in found.items())
        raise ValueError(f"{function}: {what} must have the same shape")


def has_shape(function: str, name: str, tensor: Tensor, shape: tuple[int | None, ...], letters: str) -> None:
    """Raises unless `tensor` has `shape` (None: any size); `letters` says it in words: "(T, V)"."""
    fits = tensor.ndim == len(shape)
    if not fits or not all([want is None or got == want for want, got in zip(shape, tensor.shape, strict=True)]):
        expected = ", ".join("*" if size is None else str(size) for size in shape) + "," * (len(shape) == 1)
        raise ValueError(f"{function}: {name} must be {letters} = ({expected}), got {tuple(tensor.shape)}")


def cu_seqlens_of(function: str, name: str, cu_seqlens: Tensor, num_tokens: int) -> None:
    """Raises unless `cu_seqlens` is (N + 1,) int32, starts at 0, never falls and ends at num_tokens."""
    dtype_in(function, name, cu_seqlens, (torch.int32,))
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{function}: {name} must be (N + 1,), got {tuple(cu_seqlens.shape)}")
    if readable(cu_seqlens) and not bounds_rise(cu_seqlens, num_tokens):
        bounds = cu_seqlens.tolist()
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]
        raise ValueError(f"{function}: {name} must rise from 0 to {num_tokens}, got {shown}")


def bounds_rise(bounds: Tensor, last: int, least: int = 0) -> bool:
    """Whether readable int32 bounds rise from 0 to `last` in steps of at least `least`."""
    bounds = bounds.cpu().contiguous()
    return _cpu.rises(bounds.data_ptr(), bounds.shape[0], last, least)


def indices_below(function: str, name: str, indices: Tensor, bound: int) -> None:
    """Raises unless 0 <= indices < bound."""
    if not readable(indices):
        return
    held = indices.to("cpu", torch.int64).contiguous()
    if not _cpu.within(held.data_ptr(), held.numel(), bound):
        low, high = int(held.min()), int(held.max())
        raise ValueError(f"{function}: {name} must be in [0, {bound}), got values from {low} to {high}")


def rows_of(function: str, name: str, rows: Tensor, bound: int) -> None:
    """Raises unless `rows` is (N,) int64, each in [0, bound) and none there twice."""
    dtype_in(function, name, rows, (torch.int64,))
    has_shape(function, name, rows, (None,), "(N,)")
    indices_below(function, name, rows, bound)
    if readable(rows) and len(set(rows.tolist())) < len(rows):
        raise ValueError(f"{function}: {name} must name a row only once, got {rows.tolist()[:8]}")


def alike(
    function: str, dtypes: tuple[torch.dtype, ...], tensors: dict[str, Tensor], mask: Tensor | None = None
) -> None:
    """Raises unless all `tensors` have the device, shape and dtype of the first, one of `dtypes`, and `mask` fits."""
    rest = iter(tensors.values())
    first = next(rest)
    dtype, shape, fits, cpu = first.dtype, first.shape, first.dtype in dtypes, first.is_cpu
    for t in rest:
        fits = fits and t.dtype is dtype and t.shape == shape and (t.is_cpu if cpu else t.device == first.device)
    if mask is not None:
        fits = fits and mask.dtype is torch.bool and mask.shape == shape
        fits = fits and (mask.is_cpu if cpu else mask.device == first.device)
    if fits:  # ops are called on small tensors, too: what is wrong is only found out when something is
        return
    same_device(function, **tensors, mask=mask)
    (name, _), *others = tensors.items()
    dtype_in(function, name, first, dtypes)
    for other, t in others:
        dtype_in(function, other, t, (dtype,))
        same_shape(function, **{name: first, other: t})
    mask_of(function, mask, **{name: first})


def mask_of(function: str, mask: Tensor | None, **like: Tensor) -> None:
    """Raises unless `mask` is None, or bool and of the shape of the tensor it is for."""
    if mask is not None:
        dtype_in(function, "mask", mask, (torch.bool,))
        same_shape(function, **like, mask=mask)


def dense(function: str, **tensors: Tensor) -> None:
    """Raises TypeError unless the elements of all tensors lie in memory: torch itself calculates with sparse ones."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise TypeError(f"{function}: {name} must be a dense tensor, got {tensor.layout}")


def denominator_of(function: str, denominator: float | None) -> None:
    """Raises unless `denominator` is None or a positive, finite number."""
    if denominator is not None and not 0 < denominator < math.inf:
        raise ValueError(f"{function}: denominator must be positive and finite, got {denominator}")


def computed_in(logits: Tensor) -> torch.dtype:
    """The dtype of statistics and outputs: float32, and float64 for float64."""
    return torch.promote_types(logits.dtype, torch.float32)


def one_or_all(function: str, temperature: Tensor, num_rows: int) -> None:
    """Raises unless there is one temperature for all rows or one for each."""
    if temperature.ndim != 1 or temperature.shape[0] not in (1, num_rows):
        raise ValueError(f"{function}: temperature must be ({num_rows},) or (1,), got {tuple(temperature.shape)}")


def temperature_of(function: str, temperature: float | Tensor, like: Tensor) -> Tensor:
    """The temperature as a (1,) or (T,) tensor beside `like`; raises unless it is positive and finite."""
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError(f"{function}: temperature gets no gradient, so it must be detached")
        if readable(temperature) and not bool(((temperature > 0) & temperature.isfinite()).all()):
            raise ValueError(f"{function}: every temperature must be above 0 and finite, got {temperature.min()}")
        if not temperature.is_floating_point():
            raise TypeError(f"{function}: temperature must be floating-point, got {temperature.dtype}")
        return temperature.to(computed_in(like)).reshape(temperature.shape or 1)
    if not 0 < temperature < math.inf:
        raise ValueError(f"{function}: temperature must be above 0 and finite, got {temperature}")
    return like.new_full((1,), temperature, dtype=computed_in(like))


def widen(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if it was in half precision."""
    return tensor.float() if tensor.dtype in HALF else tensor


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """The tensors as kernels take them: contiguous; None stays."""
    return [None if t is None else t.contiguous() for t in tensors]


def address(tensor: Tensor | None) -> int:
    """The address that a kernel takes for an optional tensor: 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_name(tensor: Tensor) -> str:
    """The suffix of a kernel's name: float32."""
    return NAMES[tensor.dtype]
