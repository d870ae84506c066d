"""Causal attention of each sequence of a pack to itself."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import (
    WIDE,
    address,
    contiguous,
    cu_seqlens_of,
    dtype_in,
    dtype_name,
    has_shape,
    readable,
    same_device,
    same_shape,
)
from fastrlhf.ops._registry import leaf, op

NAME = "packed_attention"


def packed_attention_ref(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefixes: Tensor | None, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    bounds = cu_seqlens.tolist()
    lengths = [0] * (len(bounds) - 1) if prefixes is None else prefixes.tolist()
    outputs, log_sums, whole = [query[:0]], [query[:0, :, 0]], 0
    for n, prefix in enumerate(lengths):
        start, end = bounds[n], bounds[n + 1]
        whole = whole if prefix else n
        before = slice(bounds[whole], bounds[whole] + prefix) if prefix else slice(0, 0)
        k, v = (torch.cat([t[before], t[start:end]]).transpose(0, 1) for t in (key, value))  # (Hkv, keys, K)
        q = query[start:end].transpose(0, 1).unflatten(0, (k.shape[0], -1))  # (Hkv, group, queries, K)
        distance = torch.arange(prefix, prefix + end - start, device=q.device)[:, None]
        distance = distance - torch.arange(prefix + end - start, device=q.device)
        hidden = (distance < 0) | (distance >= (window or math.inf))
        scores = (q @ k[:, None].transpose(-1, -2) * scale).masked_fill(hidden, -math.inf)
        log_sum = scores.logsumexp(-1)
        outputs.append(((scores - log_sum[..., None]).exp() @ v[:, None]).flatten(0, 1).transpose(0, 1))
        log_sums.append(log_sum.flatten(0, 1).t().detach())
    return torch.cat(outputs), torch.cat(log_sums)


def packed_attention_backward_ref(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefixes: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    scale, window = rest[2:]
    with torch.enable_grad():
        q, k, v = leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        out, _ = packed_attention_ref(q, k, v, cu_seqlens, prefixes, scale, window)
        of_query, of_key, of_value = torch.autograd.grad(out, leaves, grad)
    return of_query.contiguous(), of_key.contiguous(), of_value.contiguous()


def _check(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefixes: Tensor | None, scale: float, window: int
) -> None:
    same_device(NAME, query=query, key=key, value=value, cu_seqlens=cu_seqlens, prefix_lengths=prefixes)
    dtype_in(NAME, "query", query, WIDE)
    has_shape(NAME, "query", query, (None, None, None), "(T, H, K)")
    num_tokens, num_heads, width = query.shape
    has_shape(NAME, "key", key, (num_tokens, None, width), "(T, Hkv, K)")
    same_shape(NAME, key=key, value=value)
    for name, tensor in (("key", key), ("value", value)):
        dtype_in(NAME, name, tensor, (query.dtype,))
    if num_heads == 0 or width == 0 or key.shape[1] == 0 or num_heads % key.shape[1]:
        raise ValueError(f"{NAME}: H = {num_heads} heads must be a multiple of Hkv = {key.shape[1]}, and K > 0")
    cu_seqlens_of(NAME, "cu_seqlens", cu_seqlens, num_tokens)
    if prefixes is not None:
        dtype_in(NAME, "prefix_lengths", prefixes, (torch.int32,))
        has_shape(NAME, "prefix_lengths", prefixes, (cu_seqlens.shape[0] - 1,), "(N,)")
        if readable(prefixes) and readable(cu_seqlens):
            _check_prefixes(prefixes.tolist(), cu_seqlens.diff().tolist())


def _check_prefixes(prefixes: list[int], lengths: list[int]) -> None:
    room = 0  # the length of the last sequence without a prefix
    for n, (prefix, length) in enumerate(zip(prefixes, lengths, strict=True)):
        if prefix and not 0 < prefix <= room:
            raise ValueError(
                f"{NAME}: prefix_lengths[{n}] must be 0 or within the last sequence without one, got {prefix}"
            )
        room = room if prefix else length


def _check_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
    cu_seqlens, prefixes, out, log_sums, scale, window = rest
    _check(query, key, value, cu_seqlens, prefixes, scale, window)
    same_device(NAME, grad=grad, query=query, out=out, log_sums=log_sums)
    same_shape(NAME, grad=grad, query=query, out=out)
    has_shape(NAME, "log_sums", log_sums, query.shape[:2], "(T, H)")
    for name, tensor in (("grad", grad), ("out", out), ("log_sums", log_sums)):
        dtype_in(NAME, name, tensor, (query.dtype,))


def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(query.shape[:2])


def _fake_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs[:3])
    return q, k, v


def _sizes(query: Tensor, key: Tensor, cu_seqlens: Tensor, prefixes: Tensor | None) -> tuple[int, ...]:
    """Sequences, H, Hkv, K and the most keys of a sequence, as the kernels take them."""
    lengths = cu_seqlens.diff()
    keys = lengths if prefixes is None else lengths + prefixes
    return len(lengths), query.shape[1], key.shape[1], query.shape[2], int(keys.max()) if len(keys) else 0


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefixes: Tensor | None, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    inputs, outputs = contiguous(query, key, value, cu_seqlens, prefixes), _fake(query)
    sizes = _sizes(query, key, cu_seqlens, prefixes)
    getattr(_cpu, f"packed_attention_{dtype_name(query)}")(
        *map(address, (*inputs, *outputs)), *sizes, window, scale, torch.get_num_threads()
    )
    return outputs


def _cpu_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens, prefixes, out, log_sums, scale, window = rest
    inputs = contiguous(grad, query, key, value, cu_seqlens, prefixes, out, log_sums)
    grads = _fake_backward(grad, query, key, value)
    sizes = _sizes(query, key, cu_seqlens, prefixes)
    getattr(_cpu, f"packed_attention_backward_{dtype_name(query)}")(
        *map(address, (*inputs, *grads)), *sizes, window, scale, torch.get_num_threads()
    )
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    return *_gradient(grad, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None, None


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for lengths, prefixes, heads, kv_heads, width, window in [
        ((), None, 1, 1, 4, 0),
        ((1,), None, 2, 1, 1, 0),
        ((3, 0, 2), None, 2, 2, 4, 0),
        ((4, 2, 3), (0, 3, 0), 2, 1, 3, 2),
        ((30, 70, 1), None, 4, 2, 8, 0),
        ((80, 9, 33), (0, 80, 0), 3, 1, 20, 19),
        ((5, 2, 40, 1, 3), (0, 4, 5, 2, 0), 2, 1, 8, 0),
    ]:
        q, k, v = (torch.randn(sum(lengths), h, width, generator=generator) for h in (heads, kv_heads, kv_heads))
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        before = None if prefixes is None else torch.tensor(prefixes, dtype=torch.int32, device=device)
        yield *(t.to(device, dtype) for t in (q, k, v)), bounds, before, width**-0.5, window


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor? prefixes"
_gradient = leaf(
    f"packed_attention_backward(Tensor grad, {_INPUTS}, Tensor out, Tensor log_sums, float scale, int window)"
    " -> (Tensor, Tensor, Tensor)",
    ref=packed_attention_backward_ref,
    fake=_fake_backward,
    cpu=_cpu_backward,
    check=_check_backward,
)
_op = op(
    f"packed_attention({_INPUTS}, float scale, int window) -> (Tensor, Tensor)",
    ref=packed_attention_ref,
    fake=_fake,
    cpu=_cpu_forward,
    check=_check,
    samples=samples,
    grads=("query", "key", "value"),
    setup_context=_setup_context,
    backward=_backward,
)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    prefix_lengths: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Returns the attention output (T, H, K), like query.

    out[t, h] = softmax_s(scale query[t, h] . key[s, h // G]) value[s, h // G], G = H / Hkv, over the tokens s of the
    sequence of t up to t itself and, with a window, the window - 1 before it.

    query: (T, H, K) float32|float64
    key, value: (T, Hkv, K) of the same dtype, Hkv a divisor of H
    cu_seqlens: (N + 1,) int32, sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1]
    prefix_lengths: (N,) int32, where a sequence goes on from the start of the last one before it that is whole, how
        many tokens of that it sees before its own; 0 elsewhere
    scale: positive, K^-1/2 if not given
    window: number of last tokens seen; all if not given

    Query, key and value get a gradient; the output and a number for each of its rows are kept for it.
    The CPU has a kernel; elsewhere it is the reference, a loop over sequences.
    Raises: ValueError for shapes, devices, bounds, prefixes, scale or window, TypeError for dtypes.
    Source: Vaswani et al., arXiv 1706.03762, equation 1; Dao et al., arXiv 2205.14135 (the gradient).
    """
    if window is not None and window < 1:
        raise ValueError(f"{NAME}: window must be at least 1 or None, got {window}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"{NAME}: scale must be a positive number or None, got {scale}")
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.ndim and query.shape[-1] else 1.0
    out, _ = _op(query, key, value, cu_seqlens, prefix_lengths, scale, window or 0)
    return out
