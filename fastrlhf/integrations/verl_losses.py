"""PPO's clipped loss by our op, in verl's registry of policy losses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf.integrations._cases import rewards_values_mask
from fastrlhf.integrations._replacing import Known, Replacement
from fastrlhf.integrations._rows import padded
from fastrlhf.integrations.verl_advantages import CORE, VERSIONS
from fastrlhf.ops import ppo_policy_loss

NAME = "fastrlhf_ppo"


def _ppo(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute_policy_loss_fastrlhf_ppo(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        covered = loss_agg_mode == "token-mean" and rollout_is_weights is None and config is not None
        dual_clip: Any = config.get("clip_ratio_c", 3.0) if covered else None
        batch: dict[str, Any] = dict(config.global_batch_info) if covered else {}
        tokens, ranks = batch.get("batch_num_tokens"), batch.get("dp_size", 1)
        kept = response_mask.bool()
        num_kept = int(kept.sum())
        covered = covered and padded(response_mask, log_prob, old_log_prob, advantages) and num_kept > 0
        # verl asks for the tokens of all ranks where there are several, and for a bound above 1
        if not covered or not dual_clip > 1 or (tokens is None and ranks > 1):
            weights = rollout_is_weights
            return original(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, weights)
        low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
        denominator = num_kept if tokens is None else float(tokens) / ranks
        # verl keeps the log-ratio within 20. A ratio above e^20 is beyond both bounds, so only its overflow matters;
        # one below e^-20 is as good as 0
        old, advantages = old_log_prob.detach(), advantages.detach()
        limited = torch.minimum(log_prob, old + 20.0)
        loss, stats = ppo_policy_loss(
            limited, old, advantages, kept, clip_range=(low, high), dual_clip=dual_clip, denominator=denominator
        )
        with torch.no_grad():
            log_ratio = (limited - old).clamp(min=-20.0)[kept]
            beyond = (log_ratio > math.log(dual_clip)) & (advantages[kept] < 0)
            lower, kl = beyond.float().mean(), -log_ratio.mean()
            held = stats["clip_fraction"] * (denominator / num_kept)  # by either bound
        metrics = {"actor/pg_clipfrac": held - lower, "actor/ppo_kl": kl, "actor/pg_clipfrac_lower": lower}
        return loss, {name: value.item() for name, value in metrics.items()}

    return compute_policy_loss_fastrlhf_ppo


class Settings(dict[str, Any]):
    """The part of verl's ActorConfig that the loss reads."""

    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, None, 0.28

    def __init__(self, global_batch_info: dict[str, Any]) -> None:
        super().__init__(clip_ratio_c=3.0)
        self.global_batch_info = global_batch_info


def _cases(device: str) -> Iterator[tuple[Any, ...]]:
    for step, advantages, mask in rewards_values_mask(device):
        old = -step.abs()
        for info in ({}, {"dp_size": 2, "batch_num_tokens": 311}):
            yield old, (old + step).requires_grad_(), advantages, mask, "token-mean", Settings(info)


LOSSES = (
    Replacement(
        f"{CORE}:compute_policy_loss_vanilla",
        (
            Known(
                "(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode='token-mean', config=None,"
                " rollout_is_weights=None)",
                VERSIONS,
                _ppo,
                _cases,
            ),
        ),
        offer=(f"{CORE}:register_policy_loss", f"{CORE}:POLICY_LOSS_REGISTRY", NAME),
    ),
)
