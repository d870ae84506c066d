"""Training of a policy beside a reference, whose log-probabilities are computed once, before the first step."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from torch import Tensor

from fastrlhf.data.template import check_reads_ids_of
from fastrlhf.models.policy import Policy
from fastrlhf.settings.objects import ModelSource
from fastrlhf.settings.training import PreferenceConfig
from fastrlhf.trainers.dataset_trainer import DatasetTrainer
from fastrlhf.trainers.loading import check_fits, load_trained

C = TypeVar("C", bound=PreferenceConfig)
T = TypeVar("T")


class PreferenceTrainer(DatasetTrainer[C, T, Policy], Generic[C, T]):
    """What DPO and KTO share. reference_logprobs, by what they are of, are kept in checkpoints, so that a resumed run
    needs no reference; `on_model_loaded` of a subclass fills them, when there are no gradients and moments yet."""

    def make_model(self) -> Policy:
        self.reference_logprobs: dict[str, Tensor] = {}
        return load_trained(Policy, self.config, self.checkpoint, **self.placement)

    def needs_reference(self) -> bool:
        """Whether the loss has a reference."""
        return True

    def transient_model(self) -> ModelSource | None:
        if self.checkpoint is not None or not self.needs_reference():
            return None
        return self.config.reference or (None if self.config.lora_rank else self.config.model)

    def load_reference(self) -> Policy:
        """The policy without its adapter if it has one, unless another reference is asked for."""
        config, source = self.config, self.transient_model()
        if source is None:
            return Policy(self.model.model, autocast=self.model.autocast)
        if config.reference:
            check_reads_ids_of(self.tokenizer, config.reference, "reference")
        reference = Policy.from_pretrained(source, freeze=True, **self.placement)
        check_fits(reference.model, self.tokenizer, longest_row=self.longest_row)
        return reference

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step besides the model, and what the reference made of the data."""
        return {**super().state_dict(), "reference_logprobs": self.reference_logprobs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.reference_logprobs = state["reference_logprobs"]
