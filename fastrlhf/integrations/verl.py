"""verl's functions on logits and its fused head in torch, by our ops; and the list of all replacements."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf.integrations._cases import heads, logits_and_targets
from fastrlhf.integrations._replacing import Known, Replacement
from fastrlhf.integrations._rows import log_probs_and_entropy, plain
from fastrlhf.integrations.verl_advantages import ADVANTAGES, FUNCTIONS, VERSIONS
from fastrlhf.integrations.verl_losses import LOSSES
from fastrlhf.ops import linear_token_logprobs

FUSED = "verl.utils.experimental.torch_functional"


def _logits_covered(logits: Tensor, half: bool) -> bool:
    """Whether our op serves these logits. Half precision on the CPU stays with verl, which computes in it there."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    if logits.is_cuda:
        dtypes = (torch.float32, torch.bfloat16, torch.float16) if half else (torch.float32,)
    return plain(logits) and logits.dtype in dtypes and logits.ndim in (2, 3) and logits.numel() > 0


def _uses_flash_attn(original: Callable[..., Any]) -> bool:
    """Whether verl's log-probs come from flash-attn's kernel: float32 for half precision, gradient over the logits."""
    if not torch.cuda.is_available():
        return False
    logits = torch.zeros(1, 8, device="cuda", dtype=torch.bfloat16)
    return original(logits, torch.zeros(1, device="cuda", dtype=torch.int64)).dtype == torch.float32


def _logprobs_from_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    flash = _uses_flash_attn(original)

    @functools.wraps(original)
    def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        fits = plain(labels) and labels.shape == logits.shape[:-1] and labels.dtype == torch.int64
        if not fits or not _logits_covered(logits, flash):
            return original(logits, labels, inplace_backward)
        in_place = flash and inplace_backward and logits.is_cuda and logits.is_contiguous() and not logits.is_leaf
        in_place = in_place and logits._base is None and not torch.compiler.is_compiling()
        return log_probs_and_entropy(logits, labels, in_place=in_place)[0]

    return logprobs_from_logits


def _entropy_from_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def entropy_from_logits(logits: Tensor) -> Tensor:
        if not _logits_covered(logits, True) or torch.is_autocast_enabled(logits.device.type):
            return original(logits)
        return log_probs_and_entropy(logits, None)[1].to(logits.dtype)

    return entropy_from_logits


def _entropy_with_chunking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
        wide = plain(logits) and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not wide or logits.ndim != 2 or logits.numel() == 0:
            return original(logits, chunk_size)
        return log_probs_and_entropy(logits, None)[1]

    return entropy_from_logits_with_chunking


def _fused_linear(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        half = (torch.bfloat16, torch.float16) if hidden_states.is_cuda else ()
        covered = (
            plain(hidden_states, vocab_weights, input_ids)
            and hidden_states.dtype == vocab_weights.dtype
            and hidden_states.dtype in (torch.float32, *half)
            and hidden_states.shape[:-1] == input_ids.shape
            and not torch.is_autocast_enabled(hidden_states.device.type)
            and isinstance(temperature, (int, float))
        )
        if not covered:
            return original(self, hidden_states, vocab_weights, input_ids, temperature)
        logprobs, entropy = linear_token_logprobs(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            vocab_weights,
            input_ids.reshape(-1).long(),
            temperature=temperature,
            return_entropy=True,
            chunk_size=self.chunk_size,
        )
        return logprobs.view(input_ids.shape), entropy.view(input_ids.shape).to(hidden_states.dtype)

    return forward


def _cases_logprobs(device: str) -> Iterator[tuple[Any, ...]]:
    for logits, labels in [*logits_and_targets(device, 4, 16, 1000), *logits_and_targets(device, 30, 700)]:
        yield logits, labels
        yield logits, labels, False


def _cases_entropy(device: str) -> Iterator[tuple[Any, ...]]:
    yield from ((logits,) for logits, _ in logits_and_targets(device, 4, 16, 1000))


def _cases_entropy_with_chunking(device: str) -> Iterator[tuple[Any, ...]]:
    yield from ((logits, 7) for logits, _ in logits_and_targets(device, 30, 700))


def _cases_fused(device: str) -> Iterator[tuple[Any, ...]]:
    module = importlib.import_module(FUSED).FusedLinearForPPO(chunk_size=24)
    for hidden, weight, _, targets in heads(device):
        yield module, hidden, weight, targets, 0.7
        yield module, hidden.detach().view(4, 16, -1).requires_grad_(), weight, targets.view(4, 16)


REPLACEMENTS = (
    *ADVANTAGES,
    *LOSSES,
    *(
        Replacement(f"{module}:{name}", (Known(parameters, VERSIONS, make, cases),))
        for module, name, parameters, make, cases in (
            (
                FUNCTIONS,
                "logprobs_from_logits",
                "(logits, labels, inplace_backward=True)",
                _logprobs_from_logits,
                _cases_logprobs,
            ),
            (FUNCTIONS, "entropy_from_logits", "(logits)", _entropy_from_logits, _cases_entropy),
            (
                FUNCTIONS,
                "entropy_from_logits_with_chunking",
                "(logits, chunk_size=2048)",
                _entropy_with_chunking,
                _cases_entropy_with_chunking,
            ),
            (
                FUSED,
                "FusedLinearForPPO.forward",
                "(hidden_states, vocab_weights, input_ids, temperature=1.0)",
                _fused_linear,
                _cases_fused,
            ),
        )
    ),
)
