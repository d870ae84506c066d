"""TRL's functions on logits and on the language-model head, by our ops."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf.integrations._cases import heads, logits_and_targets
from fastrlhf.integrations._replacing import Known, Replacement
from fastrlhf.integrations._rows import log_probs_and_entropy, plain
from fastrlhf.ops import linear_token_logprobs

HEAD_OUTPUTS = {"log_probs", "entropy", "mean_logits", "is_top1"}  # of those of TRL, what we give


def _has_kernel(original: Callable[..., Any]) -> bool:
    """Whether this TRL has a Triton kernel for its functions on logits: that returns float32 on a GPU."""
    return hasattr(sys.modules[original.__module__], "_fused_logprob_entropy")


def _covered(logits: Tensor, index: Tensor | None = None, temperature: object = 1.0) -> bool:
    """Whether our op serves these arguments.

    Not half precision on the CPU: TRL computes its log-softmax in the dtype of the logits there, and its tests compare
    bit by bit."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if logits.is_cuda else (torch.float32, torch.float64)
    fits = plain(logits) and logits.dtype in dtypes and logits.ndim in (2, 3) and logits.numel() > 0
    if index is not None:
        fits = fits and plain(index) and index.shape == logits.shape[:-1] and index.dtype in (torch.int32, torch.int64)
    return fits and isinstance(temperature, (int, float)) and 0 < temperature < math.inf


def _rows(
    logits: Tensor, index: Tensor | None, temperature: float, row_mask: Tensor | None, kernel: bool
) -> tuple[Tensor, Tensor]:
    dropped = None if row_mask is None else row_mask == 0
    if dropped is not None and index is not None:
        index = index.masked_fill(dropped, 0)  # what stands there need not be an index
    outputs = log_probs_and_entropy(logits, index, temperature)
    wide = (kernel and logits.is_cuda) or torch.is_autocast_enabled(logits.device.type)
    dtype = torch.promote_types(logits.dtype, torch.float32) if wide else logits.dtype
    logprobs, entropy = (t.to(dtype) if dropped is None else t.to(dtype).masked_fill(dropped, 0.0) for t in outputs)
    return logprobs, entropy


def _selective_log_softmax(original: Callable[..., Any]) -> Callable[..., Any]:
    kernel = _has_kernel(original)

    @functools.wraps(original)
    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        if _covered(logits, index, temperature):
            return _rows(logits, index, temperature, row_mask, kernel)[0]
        given = {} if temperature == 1.0 and row_mask is None else {"temperature": temperature, "row_mask": row_mask}
        return original(logits, index, **given)

    return selective_log_softmax


def _entropy_from_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    kernel = _has_kernel(original)

    @functools.wraps(original)
    def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
        if _covered(logits):
            return _rows(logits, None, 1.0, None, kernel)[1]
        return original(logits, chunk_size)

    return entropy_from_logits


def _selective_log_softmax_and_entropy(original: Callable[..., Any]) -> Callable[..., Any]:
    kernel = _has_kernel(original)

    @functools.wraps(original)
    def selective_log_softmax_and_entropy(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not _covered(logits, index, temperature):
            return original(logits, index, entropy_requires_grad, temperature, row_mask)
        logprobs, entropy = _rows(logits, index, temperature, row_mask, kernel)
        return logprobs, entropy if entropy_requires_grad else entropy.detach()

    return selective_log_softmax_and_entropy


def _head_covered(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: object,
    scale: float,
    cap: float | None,
) -> bool:
    """Whether our op serves this head: one dtype for all, no ZeRO-3 weight, which backward would have to gather, and
    targets in the vocabulary (TRL takes 0 for the logit of others; where they lie on a GPU, finding out would wait).

    Half precision on the GPU only: TRL rounds the logits to it, ours stay in float32, and TRL's tests on the CPU
    compare with rounded ones."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if hidden.is_cuda else (torch.float32,)
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    options = [option for option in (temperature, scale, cap) if option is not None]
    fits = plain(targets) and targets.dtype in (torch.int32, torch.int64)
    if fits and targets.numel() and targets.is_cpu and not torch.compiler.is_compiling():
        fits = int(targets.min()) >= 0 and int(targets.max()) < weight.shape[0]
    return (
        fits
        and all(plain(t) and t.dtype == hidden.dtype and not hasattr(t, "ds_id") for t in tensors)
        and hidden.dtype in dtypes
        and all(isinstance(option, (int, float)) and 0 < option < math.inf for option in options)
    )


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The mean of each row's logits, which is linear in the hidden states."""
    mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
    return scale * (mean if bias is None else mean + bias.float().mean())


def _chunked_log_prob(original: Any) -> Any:
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        covered = dtype == hidden.dtype and set(outputs) <= HEAD_OUTPUTS
        covered = covered and not ("mean_logits" in outputs and final_logit_softcapping)
        head = hidden, weight, bias, targets, temperature, logit_scale, final_logit_softcapping
        if not covered or not _head_covered(*head):
            options = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            return original.apply(hidden, weight, bias, targets, *options)
        logprobs, entropy, *top1 = linear_token_logprobs(
            hidden,
            weight,
            targets.long(),
            bias=bias,
            temperature=temperature,
            return_entropy=True,
            return_top1="is_top1" in outputs,
            logit_scale=logit_scale,
            logit_softcap=final_logit_softcapping,
        )
        mean = _mean_logits(hidden, weight, bias, logit_scale / temperature) if "mean_logits" in outputs else None
        return logprobs, entropy if "entropy" in outputs else None, None, mean, *(top1 or [None])

    return type(original.__name__, (), {"apply": staticmethod(apply), "__doc__": original.__doc__})


def _chunked_log_prob_1_10(original: Any) -> Any:
    def apply(
        last_hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        head = last_hidden, weight, None, targets, temperature, logit_scale, final_logit_softcapping
        if not _head_covered(*head):
            options = (temperature, chunk_size, final_logit_softcapping, logit_scale)
            return original.apply(last_hidden, weight, targets, *options)
        logprobs, entropy = linear_token_logprobs(
            last_hidden,
            weight,
            targets.long(),
            temperature=temperature,
            return_entropy=True,
            logit_scale=logit_scale,
            logit_softcap=final_logit_softcapping,
        )
        return logprobs, entropy.detach()  # this version has no gradient of the entropy

    return type(original.__name__, (), {"apply": staticmethod(apply), "__doc__": original.__doc__})


def _cases_logits_and_index(device: str) -> Iterator[tuple[Any, ...]]:
    yield from logits_and_targets(device, 4, 16, 1000)


def _cases_all_arguments(device: str) -> Iterator[tuple[Any, ...]]:
    for logits, index in logits_and_targets(device, 4, 16, 1000):
        yield logits, index
        yield logits, index, 0.7, index % 5 > 0


def _cases_logits(device: str) -> Iterator[tuple[Any, ...]]:
    yield from ((logits,) for logits, _ in logits_and_targets(device, 4, 16, 1000))


def _cases_both(device: str) -> Iterator[tuple[Any, ...]]:
    for logits, index in logits_and_targets(device, 4, 16, 1000):
        for requires_grad, temperature in ((True, 0.7), (False, 1.0)):
            yield logits, index, requires_grad, temperature, index % 5 > 0


def _cases_head(device: str) -> Iterator[tuple[Any, ...]]:
    for hidden, weight, bias, targets in heads(device):
        yield hidden, weight, bias, targets, 0.7, 256, None, 1.3, ("log_probs", "entropy")
        yield hidden, weight, None, targets, 1.0, 256, 3.0, 0.5, ("log_probs", "is_top1")
        yield hidden, weight, bias, targets, 1.0, 256, None, 1.0, ("log_probs", "entropy", "mean_logits", "is_top1")


def _cases_head_1_10(device: str) -> Iterator[tuple[Any, ...]]:
    for hidden, weight, _, targets in heads(device):
        yield hidden, weight, targets, 0.7, 256, None, 1.3
        yield hidden, weight, targets, 1.0, 256, 3.0, 0.5


REPLACEMENTS = (
    Replacement(
        "trl.trainer.utils:selective_log_softmax",
        (
            Known("(logits, index)", "1.10", _selective_log_softmax, _cases_logits_and_index),
            Known(
                "(logits, index, temperature=1.0, row_mask=None)", "1.16", _selective_log_softmax, _cases_all_arguments
            ),
        ),
    ),
    Replacement(
        "trl.trainer.utils:entropy_from_logits",
        (Known("(logits, chunk_size=128)", "1.10 and 1.16", _entropy_from_logits, _cases_logits),),
    ),
    Replacement(
        "trl.trainer.utils:selective_log_softmax_and_entropy",
        (
            Known(
                "(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None)",
                "1.16",
                _selective_log_softmax_and_entropy,
                _cases_both,
            ),
        ),
    ),
    Replacement(
        "trl.trainer.utils:_ChunkedLogProbFunction",
        (
            Known(
                "(last_hidden, weight, targets, temperature, chunk_size, final_logit_softcapping=None,"
                " logit_scale=1.0)",
                "1.10",
                _chunked_log_prob_1_10,
                _cases_head_1_10,
            ),
            Known(
                "(hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None,"
                " logit_scale=1.0, outputs=('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1'))",
                "1.16",
                _chunked_log_prob,
                _cases_head,
            ),
        ),
    ),
)
