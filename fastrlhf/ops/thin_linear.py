"""A linear layer on few rows, such as the new tokens of a decode step."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import WIDE, dtype_in, dtype_name, has_shape, same_device
from fastrlhf.ops._registry import op

MOST_AT_ONCE = 64  # rows that the kernel takes in one reading of the weight


def thin_linear_ref(rows: Tensor, weight: Tensor) -> Tensor:
    return rows @ weight.T


def _check(rows: Tensor, weight: Tensor) -> None:
    alike = rows.dtype is weight.dtype and rows.device == weight.device and rows.ndim == weight.ndim == 2
    if alike and rows.shape[1] == weight.shape[1] and rows.dtype in WIDE:
        return  # called on small tensors: what is wrong is only found out when something is
    same_device("thin_linear", rows=rows, weight=weight)
    dtype_in("thin_linear", "rows", rows, WIDE)
    dtype_in("thin_linear", "weight", weight, (rows.dtype,))
    has_shape("thin_linear", "rows", rows, (None, None), "(T, D)")
    has_shape("thin_linear", "weight", weight, (None, rows.shape[1]), "(V, D)")


def _fake(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


def _cpu_forward(rows: Tensor, weight: Tensor) -> Tensor:
    rows, weight, out = rows.contiguous(), weight.contiguous(), _fake(rows, weight)
    columns = rows.new_empty(rows.shape[1], MOST_AT_ONCE)
    getattr(_cpu, f"thin_linear_{dtype_name(rows)}")(
        rows.data_ptr(),
        weight.data_ptr(),
        columns.data_ptr(),
        out.data_ptr(),
        rows.shape[0],
        *weight.shape,
        torch.get_num_threads(),
    )
    return out


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for num_rows, num_outputs, width in [(0, 3, 4), (1, 1, 1), (3, 5, 0), (5, 0, 3), (7, 40, 9), (90, 37, 300)]:
        rows, weight = (torch.randn(n, width, generator=generator) for n in (num_rows, num_outputs))
        yield rows.to(device, dtype), weight.to(device, dtype)


_op = op(
    "thin_linear(Tensor rows, Tensor weight) -> Tensor",
    ref=thin_linear_ref,
    fake=_fake,
    cpu=_cpu_forward,
    check=_check,
    samples=samples,
)


def thin_linear(rows: Tensor, weight: Tensor) -> Tensor:
    """Returns rows weight^T (T, V), which is faster than torch's product for a few to 64 rows on the CPU.

    out[t, v] = sum over d of rows[t, d] weight[v, d], added up in the order of d: a row's result depends on nothing but
    the row and the weight, not on how many there are

    rows: (T, D) float32|float64
    weight: (V, D) like rows

    No gradient. NaN in, NaN out. The weight is read once for every 64 rows (32 with AVX2, 16 without) of float32, in
    vectors across the rows, so that nothing is rearranged but the rows.
    Raises: ValueError for shapes or devices that do not fit, TypeError for dtypes.
    Source: Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", ACM TOMS 34(3), 2008.
    """
    return _op(rows, weight)
