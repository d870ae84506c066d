"""Policy, reward model and value model: a Hugging Face model on our attention, with our heads.

All three take a `Packed` batch. Loading refuses what would silently be wrong: a model that is not on transformers'
attention interface, and one whose logits our head does not reproduce.
"""

from __future__ import annotations

import copy
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from fastrlhf.attention import ATTENTION
from fastrlhf.ops import linear_token_logprobs
from fastrlhf.packing import Packed, pack


class Policy(nn.Module):
    """A causal language model read as a policy: log-probabilities of the response tokens of a pack.

    model: the transformers model, parameters shared; autocast: dtype of the forward on CUDA, None for that of the
    parameters"""

    def __init__(self, model: PreTrainedModel, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    @classmethod
    def from_pretrained(cls, path: str | Path, *, autocast: torch.dtype | None = None, **options: Any) -> Policy:
        """Returns the policy in a folder or of a hub id (see `load_causal_lm` for the options and errors)."""
        return cls(load_causal_lm(path, **options), autocast=autocast)

    def forward(
        self, batch: Packed, *, temperature: float = 1.0, return_entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns logprobs (R,) float32 of the response tokens, and with return_entropy the entropies (R,) there."""
        hidden = self.hidden(batch)[batch.predictors]
        return self.head(hidden, batch.targets, temperature=temperature, return_entropy=return_entropy)

    def hidden(self, batch: Packed) -> Tensor:
        """Returns the last hidden states (T, D), after the final norm."""
        return hidden_states(self.model, batch, self.autocast)

    def head(self, hidden: Tensor, targets: Tensor, **options: Any) -> Any:
        """Returns what `linear_token_logprobs` does, with this model's head. hidden: (R, D), targets: (R,) int64."""
        layer, config = self.model.get_output_embeddings(), self.model.config
        dtype = self.autocast or layer.weight.dtype
        return linear_token_logprobs(
            hidden.to(dtype),
            layer.weight.to(dtype),
            targets,
            bias=None if layer.bias is None else layer.bias.to(dtype),
            logit_scale=(getattr(config, "logit_scale", None) or 1.0)
            / (getattr(config, "logits_scaling", None) or 1.0),
            logit_softcap=getattr(config, "final_logit_softcapping", None),
            **options,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that AutoModelForCausalLM.from_pretrained loads."""
        self.model.save_pretrained(folder)


class ScalarModel(nn.Module):
    """A backbone with one linear head: what RewardModel and ValueModel share. Subclasses say which rows are read.

    model: a transformers *ForSequenceClassification model with one label, so that its folder loads anywhere. The offset
    of the head, `reward_bias` in its config, is ours; other readers see scores without it."""

    def __init__(self, model: PreTrainedModel, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        if model.config.num_labels != 1:
            raise ValueError(f"{type(self).__name__}: the model must have 1 label, got {model.config.num_labels}")
        self.model = model
        self.autocast = autocast

    @classmethod
    def from_pretrained(cls, path: str | Path, *, autocast: torch.dtype | None = None, **options: Any) -> Any:
        """Returns the model in a folder of one label, or a new head on the body of a causal language model.

        The weights of a new head are N(0, 1 / (D + 1)) (Stiennon et al., arXiv 2009.01325), drawn from torch's RNG.
        Raises: as `load_causal_lm`, and ValueError when the folder has another number of labels."""
        return cls(load_scalar(path, **options), autocast=autocast)

    @property
    def bias(self) -> float:
        """The offset added to the head's output."""
        return float(getattr(self.model.config, "reward_bias", 0.0))

    @bias.setter
    def bias(self, value: float) -> None:
        self.model.config.reward_bias = float(value)

    def read(self, batch: Packed, rows: Tensor) -> Tensor:
        """Returns head and bias at the given rows (M,) of the pack, float32 (M,)."""
        hidden = hidden_states(self.model, batch, self.autocast)[rows]
        return hidden.float() @ self.model.score.weight[0].float() + self.bias

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that AutoModelForSequenceClassification.from_pretrained loads."""
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
        cls,
        reward_model: RewardModel,
        *,
        autocast: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
    ) -> ValueModel:
        """Returns a trainable copy of body, head and bias (Ouyang et al., arXiv 2203.02155)."""
        model = copy.deepcopy(reward_model.model)
        device = next(model.parameters()).device
        return cls(_prepare(model, torch.float32, device, False, gradient_checkpointing), autocast=autocast)

    @classmethod
    def from_policy(cls, policy: Policy, *, gradient_checkpointing: bool = False) -> ValueModel:
        """Returns a copy of the policy's body with a zero head, so that all values start at 0."""
        config = copy.deepcopy(policy.model.config)
        config.num_labels = 1
        model = _classifier(AutoModelForSequenceClassification.from_config, config)
        model.base_model.load_state_dict(policy.model.base_model.state_dict())
        nn.init.zeros_(model.score.weight)
        device = next(policy.model.parameters()).device
        return cls(_prepare(model, torch.float32, device, False, gradient_checkpointing), autocast=policy.autocast)


def load_causal_lm(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    freeze: bool = False,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Returns a causal language model on our attention, in eval mode, without dropout.

    path: a folder or a hub id
    freeze: whether its parameters ask for no gradient

    Raises: FileNotFoundError for a folder that is not there; ValueError for a model that is not on transformers'
    attention interface, or whose logits our head does not reproduce."""
    model = AutoModelForCausalLM.from_pretrained(existing(path), dtype=dtype)
    model = _prepare(model, dtype, device, freeze, gradient_checkpointing)
    _check_head(model)
    return model


def load_scalar(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    freeze: bool = False,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Returns a one-label classification model on our attention; see `ScalarModel.from_pretrained`."""
    config = AutoConfig.from_pretrained(existing(path))
    architecture = (config.architectures or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype)
    else:
        # the body is loaded as what it is, so that nothing warns of a head that is new on purpose
        language_model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        config.num_labels = 1
        model = _classifier(AutoModelForSequenceClassification.from_config, config)
        model.base_model.load_state_dict(language_model.base_model.state_dict())
        nn.init.normal_(model.score.weight, std=(model.score.weight.shape[1] + 1) ** -0.5)
    return _prepare(model, dtype, device, freeze, gradient_checkpointing)


def hidden_states(model: PreTrainedModel, batch: Packed, autocast: torch.dtype | None = None) -> Tensor:
    """Returns the last hidden states (T, D) of a pack, after the final norm."""
    with autocasting(batch.tokens.device, autocast):
        return model.base_model(**batch.model_inputs()).last_hidden_state[0]


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """torch.autocast to a dtype, or nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def existing(path: str | Path) -> str:
    """The path as text; raises FileNotFoundError for what can only be a folder, and is none."""
    text = os.fspath(path)
    is_hub_id = not text.startswith((".", "/", "~")) and text.count("/") == 1
    if not os.path.isdir(text) and not is_hub_id:
        raise FileNotFoundError(f"model: no folder {text!r}, and no hub id OWNER/NAME either")
    return text


def _classifier(make: Any, config: Any) -> PreTrainedModel:
    try:
        return make(config)
    except ValueError as error:
        raise ValueError(
            f"{config.model_type} models have no ForSequenceClassification class in transformers"
        ) from error


def _prepare(
    model: PreTrainedModel,
    dtype: torch.dtype,
    device: torch.device | str,
    freeze: bool,
    gradient_checkpointing: bool,
) -> PreTrainedModel:
    """Puts a freshly loaded model on our attention, without dropout, its parameters in fresh memory."""
    model = model.to(device=device, dtype=dtype).eval()
    _remove_dropout(model)
    model.set_attn_implementation(ATTENTION)
    _check_attention(model)
    for parameter in model.parameters():
        # a file is mapped at any alignment, and matrix libraries choose their code by it: a resumed run would
        # differ from an uninterrupted one in the last bit
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    model.requires_grad_(not freeze)
    if gradient_checkpointing and not freeze:
        # renamed in transformers 5.2x; the first argument is the same
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model


def _remove_dropout(model: nn.Module) -> None:
    """Sets every dropout to 0: with it the ratio of the first minibatch would not be 1. eval() would not do, since
    gradient checkpointing works in train() only."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = getattr(model, "config", None)
    for name, value in list(vars(config).items()):
        if ("drop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)


def _check_attention(model: PreTrainedModel) -> None:
    device = next(model.parameters()).device
    try:
        # our attention refuses a call without a pack, so a model that accepts one is not on it
        with torch.no_grad():
            model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    except ValueError as error:
        if "fastrlhf attention" in str(error):
            return
        raise
    raise ValueError(
        f"{type(model).__name__} is not on transformers' attention interface, so it cannot run packed; use a model "
        "whose attention can be replaced (Llama, Qwen2, Qwen3, Mistral, GPT-NeoX, GPT2, Gemma3 and most recent ones)"
    )


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Compares the log-probabilities of our head with the model's own logits on one small batch."""
    device = next(model.parameters()).device
    size = model.config.get_text_config().vocab_size
    tokens = [(7919 * i) % size for i in range(12)]
    batch = pack([tokens], prompt_lengths=[1], device=device)
    ours = Policy(model)(batch)
    logits = model(**batch.model_inputs()).logits[0].float()
    theirs = logits.log_softmax(-1)[batch.predictors, batch.targets]
    error = (ours - theirs).abs().max().item()
    if not error <= (1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1):
        raise ValueError(
            f"{type(model).__name__}: log-probabilities of our head differ from the model's by {error:.2e}; it scales "
            "its logits in a way that is not known here, so training it would be wrong"
        )
