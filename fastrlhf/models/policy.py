"""Policy, reward model and value model: a transformers model on our attention, with our heads, taking a `Packed` batch.

In all three `autocast` is the dtype of the body's forward pass (bfloat16 on GPUs, over float32 parameters); None is
that of the parameters. Heads compute in the dtype of their parameters. With an `adapter` the model's body is frozen and
may be that of other roles too.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrlhf.data.objects import ModelSource
from fastrlhf.data.pretrained import without_progress_bars
from fastrlhf.errors import UserError
from fastrlhf.models.heads import autocasting, head_logprobs, head_scores, hidden_states, offsets_of
from fastrlhf.models.loading import attach_scalar, classifier, heads_of, load_causal_lm, load_scalar
from fastrlhf.models.lora import Adapter, merge_into, save_merged
from fastrlhf.packing import Packed
from fastrlhf.runtime import distributed
from fastrlhf.runtime.fsdp import unsharded
from fastrlhf.runtime.optim import check_finite_weights

ADAPTER = "adapter"  # in the folder of a model that was trained as one
__all__ = [
    "ADAPTER",
    "Policy",
    "RewardModel",
    "ScalarModel",
    "ValueModel",
    "autocasting",
    "load_causal_lm",
    "load_scalar",
]


class PackedModel(nn.Module):
    """What all have: a transformers model on our attention, whose parameters are shared, and perhaps an adapter."""

    def __init__(
        self, model: PreTrainedModel, *, autocast: torch.dtype | None = None, adapter: Adapter | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.adapter = adapter

    def hidden(self, batch: Packed, rows: Tensor) -> Tensor:
        """Returns the last hidden states (M, D) of rows (M,) of the pack, after the final norm."""
        return hidden_states(self.model, batch, rows, self.autocast, self.adapter)

    @classmethod
    def from_pretrained(cls, path: ModelSource, **options: Any) -> Any:
        raise NotImplementedError

    def adapt(self, saved: str | Path | None, **options: Any) -> Self:
        """Gives a frozen model an adapter to train, new or as saved; returns the role. options: of Adapter."""
        self.adapter = Adapter(self.model, **options) if saved is None else Adapter.load(saved, self.model)[0]
        return self

    def own_head(self) -> dict[str, Any]:
        """The head that is kept with the adapter, as arguments of Adapter.save."""
        return {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that transformers loads; an adapter is in its weights, and by itself in `adapter`.

        All processes call this and the next, and the first writes.

        Raises: NonFiniteError, before anything is written, for weights that are not finite."""
        with unsharded(self) as whole:
            check_finite_weights(whole.named_parameters())
            if not distributed.is_main_process():
                return
            with without_progress_bars():
                if self.adapter is None:
                    whole.model.save_pretrained(folder)
                else:
                    save_merged(self.model, self.adapter, folder)
                    self.adapter.save(Path(folder) / ADAPTER, **self.own_head())

    def save_trained(self, folder: str | Path) -> None:
        """Writes what training changes: the model, or the adapter and the head beside it."""
        if self.adapter is None:
            self.save_pretrained(folder)
        else:
            check_finite_weights(self.adapter.named_parameters())
            head = self.own_head().get("head")
            check_finite_weights([] if head is None else [("head", head)])
            if distributed.is_main_process():
                self.adapter.save(folder, **self.own_head())


class Policy(PackedModel):
    """A causal language model read as a policy: log-probabilities of the response tokens of a pack.

    model: what `load_causal_lm` returned"""

    @classmethod
    def from_pretrained(cls, path: ModelSource, *, autocast: torch.dtype | None = None, **options: Any) -> Policy:
        """Returns the policy in a folder or of a hub id (see `load_causal_lm` for the options and errors)."""
        return cls(load_causal_lm(path, **options), autocast=autocast)

    def forward(self, batch: Packed, **options: Any) -> Any:
        """Returns logprobs (R,) float32 of the response tokens. options: those of `head_logprobs` (temperature,
        return_entropy, or `op`, a loss on the head), which says what it returns with them."""
        return head_logprobs(self.model, self.hidden(batch, batch.predictors), batch.targets, **options)


class ScalarModel(PackedModel):
    """A body with linear heads, mostly one: what RewardModel and ValueModel share. Subclasses say which rows are read.

    model: what `load_scalar` returned: a transformers classification model with a label a head, so that its folder
    loads anywhere. The offset of a head, `reward_bias` in its config, is ours; other readers see scores without it."""

    @classmethod
    def from_pretrained(cls, path: ModelSource, *, autocast: torch.dtype | None = None, **options: Any) -> Any:
        """Returns the model in a folder or of a hub id (see `load_scalar` for the options and errors)."""
        return cls(load_scalar(path, **options), autocast=autocast)

    @classmethod
    def on_body(cls, base: Policy, adapter: Adapter, head: Tensor | None = None, bias: float = 0.0) -> Any:
        """Returns the body of `base` under an adapter of its own, with a float32 copy of a head (1, D); None: of 0."""
        model = classifier(base.model.base_model, copy.deepcopy(base.model.config))
        model.score.float()
        if head is not None:
            model.score.weight.data.copy_(head)
        model.config.reward_bias = bias
        return cls(model, autocast=base.autocast, adapter=adapter)

    @classmethod
    def from_adapter(cls, folder: str | Path, base: Policy) -> Any:
        """Returns the adapter in a folder, with its head, on the body of `base`; see `Adapter.load` for the errors.

        Raises: ValueError for several heads."""
        adapter, head, bias = Adapter.load(folder, base.model)
        if head is not None and len(head) != 1:
            raise UserError(f"reward model: {folder} has {len(head)} heads; name one: {Path(folder).parent}#HEAD")
        return cls.on_body(base, adapter, head, bias)

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of the heads; LABEL_0 of one that was given none."""
        return heads_of(self.model.config)

    @property
    def bias(self) -> float:
        """The offset added to the output of the one head."""
        (offset,) = self.biases
        return offset

    @bias.setter
    def bias(self, value: float) -> None:
        self.biases = [value]

    @property
    def biases(self) -> list[float]:
        """The offset of each head."""
        return offsets_of(self.model)

    @biases.setter
    def biases(self, values: list[float]) -> None:
        offsets = [float(value) for value in values]
        self.model.config.reward_bias = offsets[0] if len(offsets) == 1 else offsets

    def read(self, batch: Packed, rows: Tensor) -> Tensor:
        """Returns head and offset at the given rows (M,) of the pack, (M,) float32; (M, H) of H heads."""
        return head_scores(self.model, self.hidden(batch, rows))

    def adapt(self, saved: str | Path | None, **options: Any) -> Self:
        self.model.score.float().requires_grad_()
        if saved is None:
            return super().adapt(saved, **options)
        self.adapter, head, bias = Adapter.load(saved, self.model)
        self.biases = bias if isinstance(bias, list) else [bias]
        self.model.score.weight.data.copy_(head)
        return self

    def own_head(self) -> dict[str, Any]:
        biases = self.biases
        return {"head": self.model.score.weight, "bias": biases[0] if len(biases) == 1 else biases}


class RewardModel(ScalarModel):
    """Scores of whole sequences."""

    def forward(self, batch: Packed) -> Tensor:
        """Returns scores (N,) float32, read at the last token of each sequence; (N, H) of H > 1 heads."""
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
        model = copy.deepcopy(reward_model.model).float()
        if reward_model.adapter is not None:
            merge_into(model, reward_model.adapter)
        return cls._trainable(model, autocast, gradient_checkpointing)

    @classmethod
    def like(cls, reward_model: RewardModel, base: Policy) -> ValueModel:
        """Returns a trainable copy of adapter, head and offset on the body of `base`, on which the reward model is."""
        adapter = copy.deepcopy(reward_model.adapter)
        assert adapter is not None
        value_model: ValueModel = cls.on_body(base, adapter.requires_grad_(), **reward_model.own_head())
        return value_model

    @classmethod
    def from_policy(cls, policy: Policy, *, gradient_checkpointing: bool = False) -> ValueModel:
        """Returns a trainable float32 copy of the policy's body with a zero head, so that all values start at 0."""
        model = classifier(copy.deepcopy(policy.model.base_model)).float()
        if policy.adapter is not None:
            merge_into(model, policy.adapter)
        model.config.reward_bias = 0.0
        return cls._trainable(model, policy.autocast, gradient_checkpointing)

    @classmethod
    def _trainable(cls, model: PreTrainedModel, autocast: torch.dtype | None, checkpointing: bool) -> ValueModel:
        device = next(model.parameters()).device
        model = attach_scalar(model, dtype=torch.float32, device=device, gradient_checkpointing=checkpointing)
        return cls(model, autocast=autocast)
