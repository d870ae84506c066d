"""Policy, reward model and value model: a transformers model on our attention, with our heads, taking a `Packed` batch.

In all three `autocast` is the dtype of the body's forward pass (bfloat16 on GPUs, over float32 parameters); None is
that of the parameters. Heads compute in the dtype of their parameters.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrlhf import ranks
from fastrlhf.heads import autocasting, head_logprobs, head_scores, hidden_states
from fastrlhf.loading import attach_scalar, classifier, load_causal_lm, load_scalar
from fastrlhf.packing import Packed

__all__ = ["Policy", "RewardModel", "ScalarModel", "ValueModel", "autocasting", "load_causal_lm", "load_scalar"]


class Policy(nn.Module):
    """A causal language model read as a policy: log-probabilities of the response tokens of a pack.

    model: what `load_causal_lm` returned; its parameters are shared"""

    def __init__(self, model: PreTrainedModel, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    @classmethod
    def from_pretrained(cls, path: str | Path, *, autocast: torch.dtype | None = None, **options: Any) -> Policy:
        """Returns the policy in a folder or of a hub id (see `load_causal_lm` for the options and errors)."""
        return cls(load_causal_lm(path, **options), autocast=autocast)

    def forward(self, batch: Packed, *, temperature: float = 1.0, return_entropy: bool = False) -> Any:
        """Returns logprobs (R,) float32 of the response tokens, and with return_entropy the entropies (R,) there."""
        hidden = self.hidden(batch)[batch.predictors]
        return head_logprobs(self.model, hidden, batch.targets, temperature=temperature, return_entropy=return_entropy)

    def hidden(self, batch: Packed) -> Tensor:
        """Returns the last hidden states (T, D), after the final norm."""
        return hidden_states(self.model, batch, self.autocast)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that AutoModelForCausalLM.from_pretrained loads, in the first process."""
        if ranks.is_first():
            self.model.save_pretrained(folder)


class ScalarModel(nn.Module):
    """A body with one linear head: what RewardModel and ValueModel share. Subclasses say which rows are read.

    model: what `load_scalar` returned: a transformers classification model with one label, so that its folder loads
    anywhere. The offset of the head, `reward_bias` in its config, is ours; other readers see scores without it."""

    def __init__(self, model: PreTrainedModel, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    @classmethod
    def from_pretrained(cls, path: str | Path, *, autocast: torch.dtype | None = None, **options: Any) -> Any:
        """Returns the model in a folder or of a hub id (see `load_scalar` for the options and errors)."""
        return cls(load_scalar(path, **options), autocast=autocast)

    @property
    def bias(self) -> float:
        """The offset added to the head's output."""
        return float(getattr(self.model.config, "reward_bias", 0.0))

    @bias.setter
    def bias(self, value: float) -> None:
        self.model.config.reward_bias = float(value)

    def read(self, batch: Packed, rows: Tensor) -> Tensor:
        """Returns head and offset at the given rows (M,) of the pack, (M,) float32."""
        return head_scores(self.model, hidden_states(self.model, batch, self.autocast)[rows])

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that AutoModelForSequenceClassification.from_pretrained loads, in the first process."""
        if ranks.is_first():
            self.model.save_pretrained(folder)


class RewardModel(ScalarModel):
    """Scores of whole sequences."""

    def forward(self, batch: Packed) -> Tensor:
        """Returns scores (N,) float32, read at the last token of each sequence."""
        return self.read(batch, batch.last_rows)


class ValueModel(ScalarModel):
    """Values of the states before each response token."""

    def forward(self, batch: Packed) -> Tensor:
        """Returns values (R,) float32, read where the response tokens are predicted."""
        return self.read(batch, batch.predictors)

    @classmethod
    def from_reward_model(
        cls, reward_model: RewardModel, *, autocast: torch.dtype | None = None, gradient_checkpointing: bool = False
    ) -> ValueModel:
        """Returns a trainable float32 copy of body, head and offset (Ouyang et al., arXiv 2203.02155)."""
        return cls._trainable(copy.deepcopy(reward_model.model), autocast, gradient_checkpointing)

    @classmethod
    def from_policy(cls, policy: Policy, *, gradient_checkpointing: bool = False) -> ValueModel:
        """Returns a trainable float32 copy of the policy's body with a zero head, so that all values start at 0."""
        model = classifier(copy.deepcopy(policy.model.base_model))
        model.config.reward_bias = 0.0
        return cls._trainable(model, policy.autocast, gradient_checkpointing)

    @classmethod
    def _trainable(cls, model: PreTrainedModel, autocast: torch.dtype | None, checkpointing: bool) -> ValueModel:
        device = next(model.parameters()).device
        model = attach_scalar(model, dtype=torch.float32, device=device, gradient_checkpointing=checkpointing)
        return cls(model, autocast=autocast)
