"""OpenRLHF's functions on logits, its KL estimates and its advantages, by our ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf.integrations._cases import logits_and_targets, rewards_values_mask
from fastrlhf.integrations._replacing import Known, Replacement
from fastrlhf.integrations._rows import ends_of_rows, fraction, log_probs_and_entropy, padded, plain
from fastrlhf.ops import approx_kl, discounted_returns, gae

MODELS, MAKER = "openrlhf.models.utils", "openrlhf.trainer.ppo_utils.experience_maker"


def _covered(logits: Tensor) -> bool:
    """Whether our op serves these logits: OpenRLHF makes them float32 itself."""
    return plain(logits) and logits.dtype == torch.float32 and logits.ndim in (2, 3) and logits.numel() > 0


def _log_probs_from_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        fits = _covered(logits) and plain(labels) and labels.shape == logits.shape[:-1] and labels.dtype == torch.int64
        if not fits or not isinstance(temperature, (int, float)) or not temperature > 0:
            return original(logits, labels, temperature)
        # the original divides the logits in place, which breaks the gradient of an entropy taken before
        return log_probs_and_entropy(logits, labels, temperature)[0]

    return log_probs_from_logits


def _compute_entropy(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute_entropy(logits: Tensor) -> Tensor:
        return log_probs_and_entropy(logits, None)[1] if _covered(logits) else original(logits)

    return compute_entropy


def _compute_approx_kl(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute_approx_kl(log_probs: Tensor, log_probs_base: Tensor, kl_estimator: str = "k1") -> Tensor:
        fits = plain(log_probs, log_probs_base) and log_probs.shape == log_probs_base.shape
        if not fits or kl_estimator not in ("k1", "k2", "k3"):
            return original(log_probs, log_probs_base, kl_estimator)
        return approx_kl(log_probs.float(), log_probs_base.float(), estimator=kl_estimator).clamp(-10, 10)

    return compute_approx_kl


def _compute_approx_kl_of_0_11_2(original: Callable[..., Any]) -> Callable[..., Any]:
    """The form that may give the KL's gradient whatever the estimator, which is left to the original."""

    @functools.wraps(original)
    def compute_approx_kl(
        log_probs: Tensor,
        log_probs_base: Tensor,
        log_probs_old: Tensor | None = None,
        kl_estimator: str = "k1",
        unbiased_gradient: bool = False,
    ) -> Tensor:
        fits = plain(log_probs, log_probs_base) and log_probs.shape == log_probs_base.shape
        if not fits or kl_estimator not in ("k1", "k2", "k3") or unbiased_gradient:
            return original(log_probs, log_probs_base, log_probs_old, kl_estimator, unbiased_gradient)
        ratio, none = log_probs.float(), log_probs_base.float()
        if kl_estimator == "k3":  # past the clamp its derivative, which may be infinite, is not asked for
            ratio = (ratio - none).clamp(min=-10)
            none = torch.zeros_like(ratio)
        return approx_kl(ratio, none, estimator=kl_estimator).clamp(-10, 10)

    return compute_approx_kl


def _masked(mask: Tensor | None, *tensors: Tensor) -> list[Tensor] | None:
    """The tensors with zeros outside the mask, or None if our ops do not serve them.

    Tokens outside the mask stay in the sums, with reward and value 0: the trace decays through them."""
    kept = torch.ones_like(tensors[0]) if mask is None else mask
    if not padded(kept, *tensors):
        return None
    return [t.detach() if mask is None else t.detach() * mask for t in tensors]


def _advantages(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_advantages_and_returns(
        self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
    ) -> tuple[Tensor, Tensor]:
        inside = _masked(action_mask, values, rewards)
        if inside is None or not fraction(gamma, lambd):
            return original(self, values, rewards, action_mask, gamma, lambd)
        values, rewards = inside
        flat = gae(rewards.flatten(), values.flatten(), ends_of_rows(rewards), gamma=gamma, lam=lambd)
        return flat[0].view_as(rewards), flat[1].view_as(rewards)

    return get_advantages_and_returns


def _returns(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_cumulative_returns(self: Any, rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor:
        inside = _masked(action_mask, rewards)
        if inside is None or not fraction(gamma):
            return original(self, rewards, action_mask, gamma)
        return discounted_returns(inside[0].flatten(), ends_of_rows(rewards), gamma=gamma).view_as(rewards)

    return get_cumulative_returns


def _cases_log_probs(device: str) -> Iterator[tuple[Any, ...]]:
    for logits, labels in logits_and_targets(device, 4, 16, 1000):
        yield logits, labels
        yield logits, labels, 0.7


def _cases_entropy(device: str) -> Iterator[tuple[Any, ...]]:
    yield from ((logits,) for logits, _ in logits_and_targets(device, 4, 16, 1000))


def _cases_kl(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        made = (-3 * torch.rand(2, 6, 40, generator=generator)).to(device, dtype)
        for estimator in ("k1", "k2", "k3"):
            yield made[0].detach().requires_grad_(), made[1].detach(), estimator


def _cases_kl_of_0_11_2(device: str) -> Iterator[tuple[Any, ...]]:
    for log_probs, base, estimator in _cases_kl(device):
        for unbiased in (False, True):
            yield log_probs, base, None, estimator, unbiased
        yield (100 * log_probs.detach()).requires_grad_(), base, None, estimator, False


def _cases_advantages(device: str) -> Iterator[tuple[Any, ...]]:
    for rewards, values, mask in rewards_values_mask(device):
        yield None, values, rewards, mask, 0.99, 0.95
    yield None, values, rewards, None, 1.0, 1.0


def _cases_returns(device: str) -> Iterator[tuple[Any, ...]]:
    for rewards, _, mask in rewards_values_mask(device):
        yield None, rewards, mask, 0.97
    yield None, rewards, None, 1.0


VERSION = "0.11"
KL_PARAMETERS = (
    "(log_probs, log_probs_base, kl_estimator='k1')",
    "(log_probs, log_probs_base, log_probs_old=None, kl_estimator='k1', unbiased_gradient=False)",
)
REPLACEMENTS = (
    Replacement(
        f"{MODELS}:log_probs_from_logits",
        (Known("(logits, labels, temperature=1.0)", VERSION, _log_probs_from_logits, _cases_log_probs),),
    ),
    Replacement(f"{MODELS}:compute_entropy", (Known("(logits)", VERSION, _compute_entropy, _cases_entropy),)),
    Replacement(
        f"{MODELS}:compute_approx_kl",
        (
            Known(KL_PARAMETERS[0], VERSION, _compute_approx_kl, _cases_kl),
            Known(KL_PARAMETERS[1], "0.11.2", _compute_approx_kl_of_0_11_2, _cases_kl_of_0_11_2),
        ),
    ),
    Replacement(
        f"{MAKER}:RemoteExperienceMaker.get_advantages_and_returns",
        (Known("(values, rewards, action_mask, gamma, lambd)", VERSION, _advantages, _cases_advantages),),
    ),
    Replacement(
        f"{MAKER}:RemoteExperienceMaker.get_cumulative_returns",
        (Known("(rewards, action_mask, gamma)", VERSION, _returns, _cases_returns),),
    ),
)
