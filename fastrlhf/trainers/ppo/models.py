"""The models of PPO: the policy, the reference that it may not leave too far, its value model, its moving average."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastrlhf.data import Demonstration, Prompt
from fastrlhf.errors import UserError
from fastrlhf.models.lora import Adapter
from fastrlhf.models.offload import offload, onloaded
from fastrlhf.models.policy import PackedModel, Policy, RewardModel, ValueModel
from fastrlhf.runtime.fsdp import shard
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.trainers.loading import check_fits


def load_base(config: PPOConfig, *, device: torch.device, autocast: torch.dtype | None) -> Policy | None:
    """The frozen model that the adapters of a run share; None for a run without adapters."""
    if not config.has_adapters():
        return None
    return Policy.from_pretrained(
        config.model,
        freeze=True,
        # of a policy that is trained whole it is the reference, whose head rounds as the policy's does
        dtype=autocast if autocast is not None and config.lora_rank else torch.float32,
        autocast=autocast,
        device=device,
        gradient_checkpointing=config.gradient_checkpointing,
    )


class PPOModels:
    """Loads the models of a run from its settings, or from its checkpoint.

    base: of load_base; what has an adapter stands on it; placement: device and autocast

    policy: starts as `model`
    reference: `reference` or `model`; with reference_every the policy of some steps ago
    value_model: for gae; starts as the reward model if there is just one, in the form that it has itself (whole or an
        adapter), else as `model` with a zero head; then num_value_warmup_steps, the first steps for it alone, are some
    average: with ema_decay; starts as the policy"""

    def __init__(
        self,
        config: PPOConfig,
        reward_models: Sequence[RewardModel],
        checkpoint: Path | None,
        base: Policy | None = None,
        **placement: Any,
    ) -> None:
        self.config, self.checkpoint, self.base = config, checkpoint, base
        self.common, self.trained = placement, {**placement, "gradient_checkpointing": config.gradient_checkpointing}
        self.policy = self._policy()
        self.reference = self._reference()
        self.average = self._average()
        self.value_model: ValueModel | None = None
        self.num_value_warmup_steps = 0
        if config.estimator == "gae":
            one = len(reward_models) == 1 and len(reward_models[0].heads) == 1
            fits = one and (config.value_rank() == 0 or reward_models[0].adapter is not None)
            self.value_model = self._value_model(reward_models[0] if fits else None)
            default = 0 if fits else min(2, config.steps - 1)
            asked = config.value_warmup_steps
            self.num_value_warmup_steps = default if asked is None else asked

    def _policy(self) -> Policy:
        if self.base is None or not self.config.lora_rank:
            return Policy.from_pretrained(self._saved("policy") or self.config.model, **self.trained)
        saved = self._saved("policy")
        options = self.config.adapter_options()
        adapter = Adapter.load(saved, self.base.model)[0] if saved else Adapter(self.base.model, **options)
        return Policy(self.base.model, autocast=self.base.autocast, adapter=adapter)

    def _reference(self) -> Policy:
        config, saved = self.config, self._saved("reference") if self.config.reference_every else None
        if self.base is not None and config.reference in (None, config.model):
            if not config.reference_every:
                return self.base
            if config.lora_rank:
                return self._frozen_copy(saved)
        source = saved or config.reference or config.model
        reference = Policy.from_pretrained(source, freeze=True, **self.common)
        if config.reference_every and shapes_of(reference) != shapes_of(self.policy):
            raise UserError(f"reference_every: the reference {source} cannot become a policy of other shapes")
        return reference

    def _average(self) -> Policy | None:
        if self.config.ema_decay is None:
            return None
        saved = self._saved("average")
        if self.policy.adapter is not None:
            return self._frozen_copy(saved)
        return Policy.from_pretrained(saved or self.config.model, freeze=True, dtype=torch.float32, **self.common)

    def _frozen_copy(self, saved: Path | None) -> Policy:
        """The policy with an adapter of its own, which is not trained: that in a folder, or a copy."""
        model = self.policy.model
        adapter = Adapter.load(saved, model)[0] if saved else copy.deepcopy(self.policy.adapter)
        assert adapter is not None
        return Policy(model, autocast=self.policy.autocast, adapter=adapter.requires_grad_(False))

    def _value_model(self, copied: RewardModel | None) -> ValueModel:
        config, saved = self.config, self._saved("value_model")
        if self.base is not None and config.value_rank():
            if saved:
                return ValueModel.from_adapter(saved, self.base)
            if copied is not None:
                return ValueModel.like(copied, self.base)
            options = {**config.adapter_options(), "rank": config.value_rank()}
            return ValueModel.on_body(self.base, Adapter(self.base.model, **options))
        if saved:
            return ValueModel.from_pretrained(saved, **self.trained)
        options = {"gradient_checkpointing": config.gradient_checkpointing}
        if copied is not None:
            return ValueModel.from_reward_model(copied, autocast=self.common["autocast"], **options)
        return ValueModel.from_policy(self.policy, **options)

    def _saved(self, role: str) -> Path | None:
        return self.checkpoint / role if self.checkpoint else None

    def shard(self, *others: RewardModel) -> None:
        """Shards all models of PPO, and `others` (FSDP2)."""
        for model in (self.policy, self.reference, self.average, self.value_model, *others):
            if model is not None:
                shard(model)

    def offload_idle(self, *others: RewardModel) -> None:
        """Lets the reference and others rest, but for what shares its weights with a model that is trained."""
        trained = [model for model in (self.policy, self.value_model, self.average) if model is not None]
        busy = {id(parameter) for model in trained for parameter in model.parameters()}
        for model in {self.reference, *others}:
            if not any(id(parameter) in busy for parameter in model.parameters()):
                offload(model, self.common["device"])

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
            with onloaded(self.reference):
                for ours, theirs in unshared_parameters(self.reference, self.policy):
                    ours.copy_(theirs)
        if self.average is not None and self.config.ema_decay is not None:
            for ours, theirs in unshared_parameters(self.average, self.policy):
                ours.lerp_(theirs, 1 - self.config.ema_decay)

    def save(self, folder: Path) -> None:
        """Writes what `checkpoint` needs to hold."""
        self.policy.save_trained(folder / "policy")
        if self.value_model is not None:
            self.value_model.save_trained(folder / "value_model")
        if self.config.reference_every:
            with onloaded(self.reference):
                self.reference.save_trained(folder / "reference")
        if self.average is not None:
            self.average.save_trained(folder / "average")


def unshared_parameters(first: Policy, second: Policy) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """The parameters of two policies of the same shapes, but for those that they share."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return [(ours, theirs) for ours, theirs in pairs if ours is not theirs]


def shapes_of(policy: Policy) -> list[torch.Size]:
    """The shapes of its parameters, in order."""
    return [parameter.shape for parameter in policy.parameters()]


def check_lengths(
    config: PPOConfig,
    tokenizer: Any,
    models: Sequence[PackedModel],
    prompts: Sequence[Prompt],
    ptx: Sequence[Demonstration],
) -> None:
    """Raises UserError unless the context of each model holds the longest prompt with its response, and that of the
    first one, the policy, the longest demonstration."""
    longest = max(len(prompt.tokens) for prompt in prompts)
    for model in models:
        check_fits(model.model, tokenizer, longest_prompt=longest, max_new_tokens=config.max_new_tokens)
    if ptx:
        check_fits(models[0].model, tokenizer, longest_demonstration=max(len(row.tokens) for row in ptx))
