"""Sampling from logits, with the log-probabilities of what was drawn."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.ops._check import FLOATS, dtype_in, dtype_name, has_shape, readable, same_device
from fastrlhf.ops._launch import triton
from fastrlhf.ops._registry import op
from fastrlhf.ops.token_logprobs import rows_of

triton_kernel = triton("sample_tokens")
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as an int64
FIXED_POINT = 2.0**40


def _mix(z: Tensor) -> Tensor:
    """The output function of splitmix64; int64 products wrap as unsigned ones do."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        z = (z ^ (z >> shift & 2 ** (64 - shift) - 1)) * factor
    return z ^ (z >> 31 & 2**33 - 1)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Returns (N,) float64 numbers in [0, 1), each a hash of a seed and a position, the same on every device.

    Number `position` of the splitmix64 stream that starts at the hash of `seed`, its upper 53 bits.
    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    bits = _mix(_mix(seeds + GOLDEN) + (positions + 1) * GOLDEN)
    return (bits >> 11 & 2**53 - 1).double() * 2.0**-53


def _kept(scaled: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """(N, V) bool, the tokens that top-k, then top-p of what is left, and min-p keep. Ties are kept."""
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if 0 < top_k < scaled.shape[1]:
        kept &= scaled >= scaled.topk(top_k).values[:, -1:]
    if top_p < 1:
        ordered = scaled.masked_fill(~kept, -torch.inf).sort(dim=-1, descending=True).values
        shares = (ordered.softmax(-1) * FIXED_POINT).long()
        num_kept = ((shares.cumsum(-1) - shares).double() < top_p * FIXED_POINT).sum(-1, keepdim=True)
        kept &= scaled >= ordered.gather(1, num_kept.clamp(1, scaled.shape[1]) - 1)
    if min_p > 0:
        kept &= (scaled - scaled.amax(-1, keepdim=True)).exp() >= min_p
    return kept


def sample_tokens_ref(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    scaled = logits.double() / temperature
    logprobs = sampler_logprobs = scaled.log_softmax(-1)
    broken = logprobs.isnan().any(-1, keepdim=True)
    if top_k > 0 or top_p < 1 or min_p > 0:
        sampler_logprobs = scaled.masked_fill(~_kept(scaled, top_k, top_p, min_p), -torch.inf).log_softmax(-1)
        sampler_logprobs = sampler_logprobs.masked_fill(broken, torch.nan)
    # a CDF of integers is the same in whatever order a device adds them up
    cdf = (sampler_logprobs.exp() * FIXED_POINT).long().cumsum(-1)
    targets = (uniforms(seeds, positions) * cdf[:, -1].double()).long()
    tokens = torch.searchsorted(cdf, targets[:, None], right=True)
    tokens = tokens.masked_fill(broken, 0)
    logprobs, sampler_logprobs = (table.gather(1, tokens)[:, 0] for table in (logprobs, sampler_logprobs))
    return tokens[:, 0], logprobs.to(_computed_in(logits)), sampler_logprobs.to(_computed_in(logits))


def _computed_in(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.new_empty(logits.shape[0], dtype=_computed_in(logits))
    return torch.empty_like(rows, dtype=torch.int64), rows, torch.empty_like(rows)


def _check(logits: Tensor, seeds: Tensor, positions: Tensor, *_: Any) -> None:
    same_device("sample_tokens", logits=logits, seeds=seeds, positions=positions)
    dtype_in("sample_tokens", "logits", logits, FLOATS)
    has_shape("sample_tokens", "logits", logits, (None, None), "(N, V)")
    if logits.shape[1] == 0:
        raise ValueError(f"sample_tokens: logits must have at least one column, got {tuple(logits.shape)}")
    for name, tensor in (("seeds", seeds), ("positions", positions)):
        dtype_in("sample_tokens", name, tensor, (torch.int64,))
        has_shape("sample_tokens", name, tensor, (logits.shape[0],), "(N,)")


def _cpu_forward(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, logprobs, sampler_logprobs = _fake(logits)
    logits, seeds, positions = logits.to(logprobs.dtype).contiguous(), seeds.contiguous(), positions.contiguous()
    inputs = logits.data_ptr(), seeds.data_ptr(), positions.data_ptr()
    outputs = tokens.data_ptr(), logprobs.data_ptr(), sampler_logprobs.data_ptr()
    options = *logits.shape, temperature, top_k, top_p, min_p, torch.get_num_threads()
    getattr(_cpu, f"sample_tokens_{dtype_name(logits)}")(*inputs, *outputs, *options)
    return tokens, logprobs, sampler_logprobs


def _cuda_forward(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = rows_of(logits), seeds.contiguous(), positions.contiguous()
    return triton_kernel.sample_tokens(*tensors, temperature, top_k, top_p, min_p)


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for num_rows, size in [(0, 5), (1, 1), (3, 7), (5, 300), (2, 9001)]:
        logits = 2 * torch.randn(num_rows, size, generator=generator)
        logits[:, 1::5] = -torch.inf
        seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator)
        rows = logits.to(device, dtype), seeds.to(device), torch.arange(num_rows, device=device)
        for cut in [(0, 1.0, 0.0), (4, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.05), (50, 0.7, 0.01)]:
            yield *rows, 0.8, *cut


_op = op(
    "sample_tokens(Tensor logits, Tensor seeds, Tensor positions, float temperature, int top_k, float top_p,"
    " float min_p) -> (Tensor, Tensor, Tensor)",
    ref=sample_tokens_ref,
    fake=_fake,
    cpu=_cpu_forward,
    cuda=_cuda_forward if triton_kernel else None,
    check=_check,
    samples=samples,
)


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (tokens, logprobs, sampler_logprobs): a draw from each row, and how likely it was.

    tokens[n] is the first token at which the cumulative probability exceeds u, a hash of (seeds[n], positions[n]). It
    depends on nothing else but the row: not on the batch, the place in it, or the number of threads.

    logits: (N, V) float32|float64|bfloat16|float16, computed in float32 (float64 in float64); -inf is never drawn
    temperature: logits are divided by it
    top_k: keeps the k most likely tokens; 0 keeps all
    top_p: then keeps the smallest set of the most likely ones whose share reaches p, at least one; 1 keeps all
    min_p: and drops tokens less likely than min_p times the most likely one
    seeds: (N,) int64; drawn from torch's generator if not given
    positions: (N,) int64, such as the number of the token in its response; 0 if not given
    tokens: (N,) int64
    logprobs: (N,) float32 (float64 for float64), log-probability at `temperature`, before anything was dropped
    sampler_logprobs: (N,) the same after it: what the draw followed

    Tokens as likely as the last one kept are kept too, so the set does not depend on an order. A row with NaN or inf,
    or of -inf alone, raises on the CPU; elsewhere its log-probabilities are NaN and its token is 0.
    Raises: ValueError for shapes, devices, options out of range and such rows, TypeError for dtypes.
    Source: Holtzman et al., arXiv 1904.09751 (top-p); Nguyen et al., arXiv 2407.01082 (min-p).
    """
    if temperature == 0:
        raise ValueError("sample_tokens: temperature must be above 0, got 0; for the most likely token use argmax")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"sample_tokens: temperature must be above 0 and finite, got {temperature}")
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        expected = "top_k must be at least 0, top_p in (0, 1] and min_p in [0, 1]"
        raise ValueError(f"sample_tokens: {expected}, got top_k={top_k}, top_p={top_p} and min_p={min_p}")
    if seeds is None:
        seeds = torch.randint(-(2**63), 2**63 - 1, logits.shape[:1], device=logits.device)
    if positions is None:
        positions = torch.zeros_like(seeds)
    tokens, logprobs, sampler_logprobs = _op(logits, seeds, positions, temperature, top_k, top_p, min_p)
    if readable(logits) and bool(logprobs.isnan().any()):
        row = int(logprobs.isnan().nonzero()[0])
        raise ValueError(f"sample_tokens: row {row} of logits holds NaN or inf, or nothing but -inf")
    return tokens, logprobs, sampler_logprobs
