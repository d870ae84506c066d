"""Log-probabilities and entropies under a linear head, from hidden states: the (T, V) logits never exist at once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf.ops._check import same_device
from fastrlhf.ops._linear import (
    Gradients,
    Head,
    check_head,
    check_options,
    even_cuts,
    gathered,
    used_rows,
    wanted_gradients,
)
from fastrlhf.ops._registry import leaf, op
from fastrlhf.ops.token_logprobs import computed_in, one_or_all, temperature_of, token_logprobs_ref


def linear_token_logprobs_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    chunk_size: int = 0,
    batch_invariant: bool = False,
    num_saved: int = 0,
) -> tuple[Tensor, ...]:
    logits = hidden.to(computed_in(hidden)) @ weight.to(computed_in(hidden)).t()
    logits = logits if bias is None else logits + bias
    if logit_softcap is None:
        temperature = temperature / logit_scale
    else:
        logits = logit_softcap * (logit_scale * logits / logit_softcap).tanh()
    return *token_logprobs_ref(logits, targets, temperature), logits[:num_saved].detach()


def _fake(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """New tensors for logprobs, entropy, highest and log_sum of the chunks' logits, each (T,), and logits to keep."""
    num_rows, num_saved, wide = hidden.shape[0], args[-1], computed_in(hidden)
    of_rows = (hidden.new_empty(num_rows, dtype=wide) for _ in range(4))
    return *of_rows, hidden.new_empty((num_saved, weight.shape[0]), dtype=wide)


def _forward_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    chunk_size: int,
    batch_invariant: bool,
    num_saved: int,
) -> tuple[Tensor, ...]:
    head = Head.of(weight, bias, logit_scale, logit_softcap, chunk_size, batch_invariant)
    *outputs, saved = _fake(hidden, weight, num_saved)
    temperature = head.temperatures(temperature, hidden.shape[0])
    cuts = even_cuts(0, hidden.shape[0], chunk_size)
    buffer = head.buffer(hidden, cuts)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in cuts:
            logits = head.logits(hidden[rows], buffer)
            results = torch.ops.fastrlhf.token_logprobs(logits, targets[rows], temperature[rows])
            for output, result in zip(outputs, results, strict=True):
                output[rows] = result
            kept = saved[rows]
            kept.copy_(logits[: kept.shape[0]])
    return *outputs, saved


def _backward_chunks(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    entropy: Tensor,
    highest: Tensor,
    log_sum: Tensor,
    saved: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    chunk_size: int,
    batch_invariant: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    head = Head.of(weight, bias, logit_scale, logit_softcap, chunk_size, batch_invariant)
    used = used_rows(grad_logprobs, grad_entropy)
    num_used, num_saved = used.shape[0], int((used < saved.shape[0]).sum())
    grads = Gradients.zeros(hidden, weight, wanted, hidden.dtype)
    temperature = head.temperatures(temperature, hidden.shape[0])
    g, h, rest = grad_logprobs, grad_entropy, [targets, temperature, entropy, highest, log_sum]
    if num_used < hidden.shape[0]:
        hidden, *rest = (t.index_select(0, used) for t in (hidden, *rest))
        g, h = (None if t is None else t.index_select(0, used) for t in (g, h))
    cuts = even_cuts(0, num_saved, chunk_size) + even_cuts(num_saved, num_used, chunk_size)
    buffer = head.buffer(hidden, cuts)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in cuts:
            if rows.start < num_saved:
                logits = torch.index_select(saved, 0, used[rows], out=buffer[: rows.stop - rows.start])
            else:
                logits = head.logits(hidden[rows], buffer)
            upstream = [None if t is None else t[rows] for t in (g, h)]
            head.turn_into_gradient(logits, upstream, [t[rows] for t in rest])
            grads.add(head, hidden[rows], logits, used[rows])
    return grads.hidden, grads.weight.to(hidden.dtype), grads.bias.to(hidden.dtype)


def _fake_backward(g: Any, h: Any, hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(grad.to(hidden.dtype) for grad in Gradients.zeros(hidden, weight, args[-1], hidden.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.options = inputs[5:-1]


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 10
    grads = _gradient(grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.options, wanted)
    hidden, weight, bias = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return hidden, weight, None, bias, *(None,) * 6


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    for num_rows, width, size, chunk_size in [(0, 3, 5, 2), (1, 1, 1, 4), (4, 3, 5, 3), (70, 33, 1200, 32)]:
        hidden, weight = (torch.randn(n, width, generator=generator) for n in (num_rows, size))
        hidden, weight = hidden.to(device, dtype), (weight * width**-0.5).to(device, dtype)
        targets = torch.randint(size, (num_rows,), generator=generator).to(device)
        yield hidden, weight, targets, None, torch.ones(1, device=device, dtype=wide), 1.0, None, chunk_size, False, 0
        if num_rows <= 1:
            continue
        bias = torch.randn(size, generator=generator).to(device, dtype)
        temperature = torch.linspace(0.5, 2.0, num_rows).to(device, wide)
        yield hidden, weight, targets, bias, temperature, 0.7, None, chunk_size, False, num_rows // 2
        yield hidden, weight, targets, bias, temperature, 1.3, 2.5, chunk_size, True, num_rows


_OPTIONS = "float logit_scale, float? logit_softcap, int chunk_size, bool batch_invariant"
_forward = leaf(
    "linear_token_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor temperature,"
    f" {_OPTIONS}, int num_saved) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    ref=_forward_chunks,
    fake=_fake,
    cpu=_forward_chunks,  # native in that the logits of a chunk go through the kernels of token_logprobs
)
_gradient = leaf(
    "linear_token_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor hidden, Tensor weight,"
    " Tensor targets, Tensor? bias, Tensor temperature, Tensor entropy, Tensor highest, Tensor log_sum, Tensor saved,"
    f" {_OPTIONS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    ref=_backward_chunks,
    fake=_fake_backward,
    cpu=_backward_chunks,
)
_op = op(
    _forward,
    reference=linear_token_logprobs_ref,
    samples=samples,
    grads=("hidden", "weight", "bias"),
    setup_context=_setup_context,
    backward=_backward,
)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int = 512,
    batch_invariant: bool = False,
    memory_budget: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns `token_logprobs(logits, targets)` of logits = hidden weight^T + bias, made a chunk of rows at a time.

    With logit_scale the logits are multiplied by it; then with logit_softcap they are cap tanh(logits / cap).

    hidden: (T, D) float32|float64|bfloat16|float16, rows that predict the targets
    weight: (V, D) like hidden, such as lm_head.weight or, where they are tied, that of the embedding. A DTensor is
        gathered and its gradient taken to be the same on all ranks; where it is not, gather it before, with
        full_tensor(grad_placements=...). A LoRA on the head is weight + scale * (b @ a)
    targets: (T,) int64 in [0, V); elsewhere than on the CPU a target out of range gives NaN for its row
    bias: (V,) like hidden
    temperature: a number or (T,), above 0; gets no gradient
    logprobs, entropy: (T,) float32 whatever the inputs (float64 for float64); return_entropy asks for the second
    chunk_size: rows whose logits exist at a time, in float32: chunk_size x V x 4 bytes, twice with a soft cap
    batch_invariant: makes what a row gets (its gradient in hidden too) independent of the other rows, bit for bit. Rows
        are computed in tiles of chunk_size, a multiple of 64, the last filled with zeros, so that every matrix product
        has one shape. It rests on the matrix library treating the rows of a product alike, as MKL does, for one
        chunk_size, number of threads and machine; not tried on a GPU. Gradients in weight and bias are sums over rows
    memory_budget: bytes of logits (a row takes V x 4) that the forward may keep for a backward. What is kept need not
        be made again: with all rows a backward takes two matrix products in place of three

    Half-precision inputs are multiplied with float32 sums and results, and their weight gradient is summed in float32
    over all chunks. Backward makes the logits again; it leaves out rows whose upstream gradient is 0, and the products
    for what needs no gradient (a frozen head costs one product less). A second derivative raises. Deterministic.
    Raises: ValueError for shapes, devices, targets or options that do not fit, TypeError for dtypes.
    Source: Gemma 2, arXiv 2408.00118, section 2 (soft cap).
    """
    name = "linear_token_logprobs"
    scale = temperature_of(name, temperature, hidden)
    same_device(name, hidden=hidden, temperature=scale)
    weight, bias = gathered(weight), None if bias is None else gathered(bias)
    check_head(name, hidden, weight, targets, bias)
    one_or_all(name, scale, hidden.shape[0])
    check_options(name, logit_scale, logit_softcap, chunk_size, batch_invariant)
    if memory_budget < 0:
        raise ValueError(f"{name}: memory_budget must be a number of bytes, got {memory_budget}")
    num_saved = 0
    if any(wanted_gradients(hidden, weight, bias)):
        num_saved = min(hidden.shape[0], int(memory_budget // (weight.shape[0] * computed_in(hidden).itemsize)))
    options = scale, logit_scale, logit_softcap, chunk_size, batch_invariant, num_saved
    logprobs, entropy, *_ = _op(hidden, weight, targets, bias, *options)
    return (logprobs, entropy) if return_entropy else logprobs
