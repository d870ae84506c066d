"""The models of PPO: the policy, the reference that it may not leave too far, its value model, its moving average."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastrlhf.models import Policy, RewardModel, ValueModel
from fastrlhf.ppo_config import PPOConfig


class Roles:
    """Loads the models of a run from its settings, or from its checkpoint.

    policy: starts as `model`
    reference: `reference` or `model`; with reference_every the policy of some steps ago
    value_model: for gae; a copy of the reward model if there is just one, else the policy's body with a zero head
    average: with ema_decay; starts as the policy"""

    def __init__(self, config: PPOConfig, reward_models: Sequence[RewardModel], checkpoint: Path | None) -> None:
        self.config = config
        common: dict[str, Any] = {"autocast": config.autocast_dtype(), "device": config.resolve_device()}
        trained = {**common, "gradient_checkpointing": config.gradient_checkpointing}
        self.policy = Policy.from_pretrained(checkpoint / "policy" if checkpoint else config.model, **trained)
        moved = checkpoint is not None and config.reference_every > 0
        reference = checkpoint / "reference" if checkpoint and moved else config.reference or config.model
        self.reference = Policy.from_pretrained(reference, freeze=True, **common)
        if config.reference_every and shapes_of(self.reference) != shapes_of(self.policy):
            raise ValueError(f"reference_every: the reference {reference} cannot become a policy of other shapes")
        self.average: Policy | None = None
        if config.ema_decay is not None:
            source = checkpoint / "average" if checkpoint else config.model
            self.average = Policy.from_pretrained(source, freeze=True, dtype=torch.float32, **common)
        self.value_model: ValueModel | None = None
        if config.estimator != "gae":
            return
        if checkpoint:
            self.value_model = ValueModel.from_pretrained(checkpoint / "value_model", **trained)
        elif len(reward_models) == 1:
            options = {name: trained[name] for name in ("autocast", "gradient_checkpointing")}
            self.value_model = ValueModel.from_reward_model(reward_models[0], **options)
        else:
            self.value_model = ValueModel.from_policy(self.policy, gradient_checkpointing=config.gradient_checkpointing)

    @property
    def final(self) -> Policy:
        """The policy that a run leaves."""
        return self.average or self.policy

    @torch.no_grad()
    def end_step(self, number: int) -> None:
        """Moves the average towards the policy, and the reference to it when that is due; number: of the step, from 1.

        Source: Ouyang et al., arXiv 2203.02155, appendix C.4 (average of the weights)."""
        every = self.config.reference_every
        if every and number % every == 0:
            for ours, theirs in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
                ours.copy_(theirs)
        if self.average is not None and self.config.ema_decay is not None:
            for ours, theirs in zip(self.average.parameters(), self.policy.parameters(), strict=True):
                ours.lerp_(theirs, 1 - self.config.ema_decay)

    def save(self, folder: Path) -> None:
        """Writes what `checkpoint` needs to hold."""
        self.policy.save_pretrained(folder / "policy")
        if self.value_model is not None:
            self.value_model.save_pretrained(folder / "value_model")
        if self.config.reference_every:
            self.reference.save_pretrained(folder / "reference")
        if self.average is not None:
            self.average.save_pretrained(folder / "average")


def shapes_of(policy: Policy) -> list[torch.Size]:
    """The shapes of its parameters, in order."""
    return [parameter.shape for parameter in policy.parameters()]
