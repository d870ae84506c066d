"""verl's whitening and advantages, by our ops."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrlhf.integrations._cases import rewards_mask, rewards_values_mask
from fastrlhf.integrations._replacing import Known, Replacement
from fastrlhf.integrations._rows import ends_of_rows, fraction, padded
from fastrlhf.ops import gae, group_advantages

FUNCTIONS, CORE = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
VERSIONS = "0.8 and 0.10"


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


ADVANTAGES = tuple(
    Replacement(f"{module}:{name}", (Known(parameters, VERSIONS, make, cases),))
    for module, name, parameters, make, cases in (
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
