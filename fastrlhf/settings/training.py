"""Settings of the loops: SFT, reward models, preferences, and what PPO has in common with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastrlhf.errors import UserError
from fastrlhf.settings.base import Settings
from fastrlhf.settings.objects import GivenObject, ModelSource, RowsSource
from fastrlhf.settings.option import REQUIRED, option, rare, reads

REWARDS = ("reward", "eval_reward", "gold", "first", "second", "model")  # settings that may be the URL of a server
ORIGIN = re.compile(r"https?://[^/,|;()=]+", re.IGNORECASE)
TEMPLATES, DTYPES = ("auto", "chat", "none"), ("auto", "float32", "bfloat16")
SCHEDULES = ("constant", "linear", "cosine")
OBJECTIVES = ("pairs", "plackett_luce", "all_pairs", "outcome", "ratings")  # of a reward model
COMPARISONS = ("pairs", "plackett_luce", "all_pairs")  # those that compare responses
LOSSES = ("sigmoid", "ipo", "hinge", "simpo", "orpo", "kto")  # of preferences


@dataclass(frozen=True, kw_only=True)
class JobConfig(Settings):
    """What every job needs that puts rows through a model."""

    max_tokens: int = option(4096, "tokens a micro-batch: memory and speed, not results", at_least=1, resume="free")
    max_rejected: float = rare(0.01, "stop if a larger share of the rows is rejected", between=(0, 1), resume="free")
    template: str = option("auto", "chat template: auto (if the tokenizer has one), chat or none", choices=TEMPLATES)
    template_kwargs: Mapping[str, Any] | None = rare(None, "what the template gets: '{enable_thinking: false}'")
    seed: int = option(0, "seed of everything that is drawn", at_least=0, below=2**31)
    device: str = option("auto", "{}", choices="auto cpu cuda", resume="free")
    dtype: str = option("auto", "of the forward: auto (bfloat16 on cuda), float32 or bfloat16", choices=DTYPES)

    def resolve_device(self) -> torch.device:
        """The device of the run; raises ValueError for cuda without a GPU."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device is cuda, but torch sees no GPU")
        wanted = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        return torch.device(wanted)

    def placement(self) -> dict[str, Any]:
        """Where models compute and in which dtype, as their from_pretrained takes it: device and autocast."""
        return {"device": self.resolve_device(), "autocast": self.autocast_dtype()}

    def autocast_dtype(self) -> torch.dtype | None:
        """dtype of the forward where it is not that of the fp32 weights."""
        half = self.dtype == "bfloat16" or (self.dtype == "auto" and self.resolve_device().type == "cuda")
        return torch.bfloat16 if half else None


@dataclass(frozen=True, kw_only=True)
class ScoringConfig(JobConfig):
    """Settings of every job that calls reward functions or reward servers (docs/rewards.md)."""

    reward_timeout: float | None = rare(
        3600.0,
        "seconds for one call of a reward function or server; none: no limit",
        above=0,
        at_most=1e9,
        resume="free",
    )  # clocks take no more
    reward_batch: int | None = rare(
        None, "most responses in one request to a reward server; default: all of a step", at_least=1, resume="free"
    )
    reward_key_file: str | None = rare(None, "file with the API key of the reward server", path="file", resume="free")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        texts = [str(getattr(self, name, None)) for name in REWARDS]
        origins = sorted({origin for text in texts for origin in ORIGIN.findall(text)})
        for name in ("reward_batch", "reward_key_file"):
            if getattr(self, name) is not None and not origins:
                yield f"{name} is for reward servers, and no reward is the URL of one: leave it out"
        if self.reward_key_file is not None and len(origins) > 1:
            yield f"reward_key_file: one server would get the key of another: {', '.join(origins)}"

    def reward_options(self) -> dict[str, Any]:
        """Returns these settings as keywords of a `Scorer`."""
        names = ("reward_timeout", "reward_batch", "reward_key_file")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(JobConfig):
    """What every loop needs."""

    model: ModelSource = reads(REQUIRED, "folder or hub id of the model to start from, or smollm2", object="model")
    data: RowsSource = reads(REQUIRED, "JSONL, JSON or Parquet: file, folder or glob (docs/data.md)", object="rows")
    output: str = option(REQUIRED, "folder for checkpoints, metrics and the final model", path="output", resume="free")
    tokenizer: str | Any | None = rare(
        None, "folder or hub id of the tokenizer; default: that of model", path="input", object="tokenizer"
    )
    batch_size: int = option(32, "sequences (reward: pairs; ppo: responses) a step", at_least=1)
    learning_rate: float = option(1e-5, "peak learning rate of AdamW", above=0, resume="plan")
    schedule: str = option("cosine", "of the learning rate: {} (to 0)", choices=SCHEDULES, resume="plan")
    warmup_ratio: float = option(0.03, "share of steps in which the rate rises from 0", between=(0, 1), resume="plan")
    weight_decay: float = option(0.0, "decoupled weight decay of matrices", at_least=0)
    optimizer: str = rare("adamw", "{}: moments of a byte each (bitsandbytes)", choices="adamw adamw8bit")
    adam_eps: float = rare(1e-5, "epsilon of AdamW", above=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    limit: int | None = option(None, "use only so many rows of the data", at_least=1)
    save_every: int = option(100, "steps between checkpoints; 0: none", at_least=0, resume="free")
    save_minutes: float = rare(
        None,
        "checkpoint at least every so many minutes; 0: off; default 15, or 0 if save_every is 0",
        at_least=0,
        resume="free",
    )
    keep_checkpoints: int = rare(2, "how many of them stay, the newest", at_least=1, resume="free")
    parallel: str = rare(
        "ddp", "under torchrun: {} (a copy of each model a process, or shards)", choices="ddp fsdp", resume="free"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in backward to save memory", resume="free")
    lora_rank: int = option(0, "train a low-rank adapter of this rank, and the head; 0: all weights", at_least=0)
    lora_alpha: float = rare(32.0, "what an adapter computes is multiplied by lora_alpha / lora_rank", above=0)
    lora_targets: str = rare("all", "linear layers with an adapter, such as q_proj,v_proj; all: those of the body")
    tensorboard: bool = option(False, "also write TensorBoard files", resume="free")
    resume: bool = option(False, "continue from the newest checkpoint in the output folder", resume="free")
    overwrite: bool = option(False, "delete an earlier run in the output folder", resume="free")

    def fill_in(self) -> None:
        super().fill_in()
        if self.save_minutes is None:
            object.__setattr__(self, "save_minutes", 15.0 if str(self.save_every) != "0" else 0.0)

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if isinstance(self.model, GivenObject) and self.tokenizer is None:
            yield "tokenizer: a model that is an object brings none: give its folder, hub id, or the tokenizer itself"
        if not self.has_adapters() and (self.lora_alpha, self.lora_targets) != (32.0, "all"):
            yield "lora_alpha and lora_targets are of adapters, and there is none: set lora_rank"
        if self.parallel == "fsdp" and self.optimizer == "adamw8bit":
            yield "parallel: fsdp cuts the moments of adamw only; adamw8bit takes ddp"
        if self.parallel == "fsdp" and self.has_adapters():
            yield "parallel: fsdp is for models that are trained whole; adapters (lora_rank) take ddp"

    def has_adapters(self) -> bool:
        """Whether some model is trained as an adapter."""
        return self.lora_rank > 0

    def adapter_options(self) -> dict[str, Any]:
        """What an adapter is made with, but for its model."""
        return {"rank": self.lora_rank, "alpha": self.lora_alpha, "targets": self.lora_targets}


@dataclass(frozen=True, kw_only=True)
class DatasetTrainerConfig(TrainerConfig):
    """What the loops on a file of rows need besides."""

    epochs: int = option(1, "passes over the data", at_least=1, resume="plan")
    max_length: int = option(1024, "rows with a longer sequence are rejected", at_least=2)
    eval_data: RowsSource | None = reads(
        None, "held-out file; metrics on it are reported after each epoch", object="rows"
    )
    eval_fraction: float = option(0.0, "without eval_data: hold out this last share of the data", between=(0, 0.9))
    eval_limit: int | None = option(None, "use only so many held-out rows", at_least=1)
    eval_every: int = option(0, "also evaluate after every so many steps; 0: after each epoch only", at_least=0)

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.eval_every and self.eval_data is None and not self.eval_fraction:
            yield f"eval_every ({self.eval_every}) needs held-out rows: set eval_data or eval_fraction"
        if self.eval_data is not None and self.eval_fraction:
            yield f"give eval_data ({self.eval_data}) or eval_fraction ({self.eval_fraction}), not both"


@dataclass(frozen=True, kw_only=True)
class SFTConfig(DatasetTrainerConfig):
    """Supervised fine-tuning on demonstrations."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(DatasetTrainerConfig):
    """A reward model from responses that were judged."""

    objective: str = option("auto", "{}; auto: by the columns", choices=("auto", *OBJECTIVES))
    share_prompts: bool = rare(True, "read a prompt once for all its responses, where models allow it", resume="free")
    label_smoothing: float = option(0.0, "pairs: share of labels believed wrong", between=(0, 0.5))
    center_coef: float = option(0.0, "pairs: weight of the mean squared sum of a pair's scores (say 0.01)", at_least=0)
    center_bias: bool = option(True, "at the end, shift scores: the best responses (of comparisons) score 0 on average")
    center_data: RowsSource | None = rare(
        None, "demonstrations that are to score 0 on average in place of those", path="input", object="rows"
    )
    ties: str = rare("skip", "all_pairs: of equal rank: skip, or half (a pair with target 1/2)", choices="skip half")
    head_init: str = rare("normal", "weights of a new head: N(0, 1 / (width + 1)), or zero", choices="normal zero")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.center_data is not None and not self.center_bias:
            yield "center_data needs center_bias"

    def unused(self) -> Iterator[tuple[str, str]]:
        yield from super().unused()
        why = f" has no effect on objective {self.objective}"
        if self.objective not in ("auto", "pairs"):
            yield "label_smoothing center_coef", why
        if self.objective not in ("auto", "all_pairs"):
            yield "ties", why
        if self.objective not in ("auto", *COMPARISONS):
            yield "center_data", why

    def check_objective(self, objective: str) -> None:
        """Raises ValueError for an option that does nothing for the objective that auto has become."""
        replace(self, objective=objective)


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(DatasetTrainerConfig):
    """What DPO and KTO need: training of a policy beside a reference."""

    learning_rate: float = option(1e-6, "peak learning rate of AdamW", above=0, resume="plan")
    reference: ModelSource | None = reads(None, "folder or hub id of the reference (default: model)", object="model")


@dataclass(frozen=True, kw_only=True)
class KTOConfig(PreferenceConfig):
    """A policy from labelled responses."""

    beta: float = option(0.1, "tie to the reference", above=0)
    desirable_weight: float = option(1.0, "weight of the responses that are wanted", at_least=0)
    undesirable_weight: float = option(1.0, "weight of the others", at_least=0)


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PreferenceConfig):
    """A policy from preference pairs or labelled responses."""

    loss: str = option("sigmoid", "sigmoid (DPO), ipo, hinge, simpo, orpo; of labelled responses: kto", choices=LOSSES)
    beta: float = option(0.1, "tie to the reference (simpo: scale, often 2; orpo: weight of the odds)", above=0)
    reference_free: bool = rare(False, "no reference (simpo, orpo: never one)")
    length_normalized: bool = rare(False, "means over tokens in place of sums (simpo, orpo: always)")
    share_prompts: bool = rare(True, "read a prompt once for all its responses, where models allow it", resume="free")
    label_smoothing: float = option(0.0, "share of labels believed wrong (sigmoid: conservative DPO)", between=(0, 0.5))
    target_margin: float = rare(0.0, "simpo: gamma, by how much the chosen response is to lead", at_least=0)
    desirable_weight: float = rare(1.0, "kto: weight of the responses that are wanted", at_least=0)
    undesirable_weight: float = rare(1.0, "kto: weight of the others", at_least=0)
    sft_coef: float = rare(0.0, "weight of the mean log-probability of chosen responses, added to the loss", at_least=0)

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.loss == "kto" and (self.reference_free or self.length_normalized or self.sft_coef):
            yield "loss kto has none of reference_free, length_normalized and sft_coef"
        if self.loss != "kto" and (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            yield f"desirable_weight and undesirable_weight have no effect on loss {self.loss}"
        if self.loss in ("simpo", "orpo") and (self.reference or self.reference_free or self.length_normalized):
            yield f"loss {self.loss} has no reference and takes means over tokens, leave those options out"
        if self.reference and self.reference_free:
            yield f"give reference ({self.reference}) or reference_free, not both"

    def unused(self) -> Iterator[tuple[str, str]]:
        yield from super().unused()
        if self.loss != "sigmoid":
            yield "label_smoothing", f" has no effect on loss {self.loss}"
        if self.loss != "simpo":
            yield "target_margin", f" has no effect on loss {self.loss}"
