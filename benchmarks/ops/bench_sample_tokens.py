"""sample_tokens against torch.multinomial behind transformers' warpers of logits, each with both log-probabilities."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from benchmarks.case import Case, expect_close
from fastrlhf import sample_tokens

SIZES = {"cpu": [(64, 49152)], "cuda": [(64, 128256)], "tiny": [(3, 50)]}
FILTERS = {"no filter": {}, "top-k 50": {"top_k": 50}, "top-p 0.9": {"top_p": 0.9}}
TEMPERATURE = 0.8
Function = Callable[..., tuple[Tensor, Tensor, Tensor]]


def inputs(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (3 * torch.randn(rows, size)).to(dtype), torch.arange(rows), torch.arange(rows)


def ours(logits: Tensor, seeds: Tensor, positions: Tensor, **filters: float) -> tuple[Tensor, Tensor, Tensor]:
    return sample_tokens(logits, temperature=TEMPERATURE, seeds=seeds, positions=positions, **filters)


def tables(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """The log-probabilities at the temperature, and those behind the filter."""
    scaled = filtered = logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE
    if top_k:
        filtered = TopKLogitsWarper(top_k)(None, filtered)
    if top_p < 1:
        filtered = TopPLogitsWarper(top_p)(None, filtered)
    logprobs = scaled.log_softmax(-1)
    return logprobs, logprobs if filtered is scaled else filtered.log_softmax(-1)


def by_transformers(
    logits: Tensor, seeds: Tensor, positions: Tensor, **filters: float
) -> tuple[Tensor, Tensor, Tensor]:
    before, after = tables(logits, **filters)
    tokens = torch.multinomial(after.exp(), 1)
    return tokens[:, 0], before.gather(1, tokens)[:, 0], after.gather(1, tokens)[:, 0]


def check(functions: dict[str, Function], filters: dict[str, float], *inputs: Tensor) -> dict[str, float]:
    """Each draws its own tokens: those that the filter keeps, with their log-probabilities."""
    exact, errors = tables(inputs[0].double(), **filters), {}
    for name, function in functions.items():
        tokens, *logprobs = function(*inputs)
        pairs = zip(logprobs, (table.gather(1, tokens[:, None])[:, 0] for table in exact), strict=True)
        errors[name] = max(expect_close(name, a, e, atol=1e-3) for a, e in pairs)
        assert exact[1].gather(1, tokens[:, None]).isfinite().all(), f"{name} drew what the filter drops"
    return errors


def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    for rows, size in sizes:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        for what, filters in FILTERS.items():
            functions = {"fastrlhf": partial(ours, **filters), "transformers": partial(by_transformers, **filters)}
            checks, made = partial(check, functions, filters), partial(inputs, rows, size, dtype)
            yield Case(
                f"{what}, {rows} x {size}",
                functions,
                made,
                check=checks,
                work={"gb_s": rows * size * dtype.itemsize / 1e9},
            )
