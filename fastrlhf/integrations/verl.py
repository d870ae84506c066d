"""verl's functions on logits, its fused head in torch, whitening and advantages, by our ops."""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrlhf.integrations._cases import heads, logits_and_targets, rewards_mask, rewards_values_mask
from fastrlhf.integrations._replacing import Known, Replacement
from fastrlhf.integrations._rows import ends_of_rows, fraction, log_probs_and_entropy, padded, plain
from fastrlhf.ops import gae, group_advantages, linear_token_logprobs

FUNCTIONS, FUSED, CORE = (
    "verl.utils.torch_functional",
    "verl.utils.experimental.torch_functional",
    "verl.trainer.ppo.core_algos",
)


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


def _whiten(values: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    """verl's: the unbiased variance, and elements outside the mask are moved and scaled like those inside."""
    kept = mask.bool()
    moments = torch.ops.fastrlhf.masked_moments(values, kept)
    num_kept = int(moments[0])
    if num_kept == 0:
        raise ValueError("At least one element in the mask has to be 1.")
    if num_kept == 1:
        raise ValueError("The sum of the mask is one, which can cause a division by zero.")
    # the op divides by n, so the squares are given n / (n - 1) times
    scaled = moments * moments.new_tensor([1.0, 1.0, num_kept / (num_kept - 1)])
    return torch.ops.fastrlhf.masked_whiten(values, None, scaled, shift_mean, 1e-8)


def _masked_whiten(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        if not padded(mask, values) or (values.requires_grad and torch.is_grad_enabled()):
            return original(values, mask, shift_mean)
        return _whiten(values.detach(), mask, shift_mean)

    return masked_whiten


def _gae(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute_gae_advantage_return(
        token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        if not padded(response_mask, token_level_rewards, values) or not fraction(gamma, lam):
            return original(token_level_rewards, values, response_mask, gamma, lam)
        rewards, values, kept = token_level_rewards.detach(), values.detach(), response_mask.bool()
        ends = ends_of_rows(rewards)
        flat = gae(rewards.flatten(), values.flatten(), ends, mask=kept.flatten(), gamma=gamma, lam=lam)[0]
        # outside the mask verl leaves the advantage of the next token inside it, and 0 after the last one
        length = rewards.shape[1]
        position = torch.arange(length, device=kept.device).expand_as(kept).masked_fill(~kept, length)
        following = position.flip(1).cummin(1).values.flip(1)
        advantages = torch.nn.functional.pad(flat.view_as(rewards), (0, 1)).gather(1, following)
        return _whiten(advantages, kept, True), advantages + values

    return compute_gae_advantage_return


def _reinforce_plus_plus(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute_reinforce_plus_plus_outcome_advantage(
        token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        gamma: Any = getattr(config, "gamma", None)
        if not padded(response_mask, token_level_rewards) or not fraction(gamma):
            return original(token_level_rewards, response_mask, config, **kwargs)
        rewards, kept = token_level_rewards.detach(), response_mask.bool()
        none = torch.zeros_like(rewards).flatten()  # GAE without values at lam = 1 is the discounted sum
        flat = gae(rewards.flatten(), none, ends_of_rows(rewards), mask=kept.flatten(), gamma=gamma, lam=1.0)[0]
        returns = flat.view_as(rewards)
        return _whiten(returns, kept, True) * response_mask, returns

    return compute_reinforce_plus_plus_outcome_advantage


def _in_groups(scores: Tensor, index: Any, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    """The advantages of `group_advantages` in the order of the scores, and whether a response is alone in its group."""
    _, group, counts = np.unique(np.asarray(index), return_inverse=True, return_counts=True)
    order = torch.from_numpy(np.argsort(group, kind="stable")).to(scores.device)
    ends = torch.from_numpy(np.concatenate([[0], counts.cumsum()])).to(scores.device, torch.int32)
    advantages = torch.empty_like(scores)
    advantages[order] = group_advantages(scores[order], ends, kind=kind, eps=eps)
    return advantages, torch.from_numpy(counts[group] == 1).to(scores.device)


def _grpo(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute_grpo_outcome_advantage(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        epsilon: float = 1e-6,
        norm_adv_by_std_in_grpo: bool = True,
        config: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if not padded(response_mask, token_level_rewards) or not epsilon > 0:
            return original(token_level_rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo, config)
        scores = token_level_rewards.detach().sum(-1)
        kind = "grpo" if norm_adv_by_std_in_grpo else "dr_grpo"
        advantages, alone = _in_groups(scores, index, kind, epsilon)
        # verl takes mean 0 and deviation 1 for a group of one
        advantages = torch.where(alone, scores / (1 + epsilon) if norm_adv_by_std_in_grpo else scores, advantages)
        spread = advantages[:, None] * response_mask
        return spread, spread

    return compute_grpo_outcome_advantage


def _rloo(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute_rloo_outcome_advantage(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        epsilon: float = 1e-6,
        config: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        if not padded(response_mask, token_level_rewards):
            return original(token_level_rewards, response_mask, index, epsilon, config, **kwargs)
        scores = token_level_rewards.detach().sum(-1)
        advantages, alone = _in_groups(scores, index, "rloo", 1.0)
        spread = (
            torch.where(alone, scores, advantages)[:, None] * response_mask
        )  # verl keeps the score of a group of one
        return spread, spread

    return compute_rloo_outcome_advantage


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


def _cases_whiten(device: str) -> Iterator[tuple[Any, ...]]:
    for values, mask in rewards_mask(device):
        yield values, mask
        yield values, mask, False


def _cases_gae(device: str) -> Iterator[tuple[Any, ...]]:
    for rewards, values, mask in rewards_values_mask(device):
        if mask.dtype != torch.bool:  # verl subtracts masks, which bool tensors refuse
            yield rewards, values, mask, 0.99, 0.95


def _cases_reinforce(device: str) -> Iterator[tuple[Any, ...]]:
    for rewards, mask in rewards_mask(device):
        if mask.dtype != torch.bool:
            yield rewards, mask, types.SimpleNamespace(gamma=0.97)


def _cases_groups(device: str) -> Iterator[tuple[Any, ...]]:
    index = np.array(["b", "a", "b", "c", "a", "b"], dtype=object)  # groups apart from each other, one of one
    yield from ((rewards, mask, index) for rewards, mask in rewards_mask(device))


def _cases_grpo(device: str) -> Iterator[tuple[Any, ...]]:
    for case in _cases_groups(device):
        yield (*case, 1e-6, True)
        yield (*case, 1e-6, False)


REPLACEMENTS = tuple(
    Replacement(f"{module}:{name}", (Known(parameters, "0.8 and 0.10", make, cases),))
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
        (FUNCTIONS, "masked_whiten", "(values, mask, shift_mean=True)", _masked_whiten, _cases_whiten),
        (
            CORE,
            "compute_gae_advantage_return",
            "(token_level_rewards, values, response_mask, gamma, lam)",
            _gae,
            _cases_gae,
        ),
        (
            CORE,
            "compute_reinforce_plus_plus_outcome_advantage",
            "(token_level_rewards, response_mask, config=None, **kwargs)",
            _reinforce_plus_plus,
            _cases_reinforce,
        ),
        (
            CORE,
            "compute_grpo_outcome_advantage",
            "(token_level_rewards, response_mask, index, epsilon=1e-06, norm_adv_by_std_in_grpo=True, config=None)",
            _grpo,
            _cases_grpo,
        ),
        (
            CORE,
            "compute_rloo_outcome_advantage",
            "(token_level_rewards, response_mask, index, epsilon=1e-06, config=None, **kwargs)",
            _rloo,
            _cases_groups,
        ),
    )
)
