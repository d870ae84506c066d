"""Settings of each loop: a frozen dataclass whose fields are also the keys of its YAML file and its CLI options.

Values are converted to the field's type and checked when the configuration is made, wherever they come from. What is
given wins over the preset, and the preset over the defaults. options.py reads the command line and YAML.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastrlhf.errors import UserError
from fastrlhf.settings.values import convert_all

SCHEDULES = ("constant", "linear", "cosine")
OBJECTIVES = ("pairs", "plackett_luce", "all_pairs", "outcome", "ratings")  # of a reward model
REQUIRED = dataclasses.MISSING


def option(default: Any, help: str, *, rare: bool = False, positional: bool = False) -> Any:
    """A field with a line of help; a REQUIRED one must be given. --help leaves out rare ones, --help-all does not.

    positional: on a command line the value may stand without --key, in the order of these fields"""
    return dataclasses.field(default=default, metadata={"help": help, "rare": rare, "positional": positional})


rare = functools.partial(option, rare=True)


def check_template_kwargs(config: Any) -> None:
    """Raises ValueError for keywords of the chat template where there is none."""
    if config.template_kwargs and config.template == "none":
        raise UserError("template_kwargs are the chat template's, but template is none: leave them out")


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What every job needs that puts rows through a model."""

    max_tokens: int = option(4096, "tokens a micro-batch: memory and speed, not results")
    max_rejected: float = rare(0.01, "stop if a larger share of the rows is rejected")
    template: str = option("auto", "chat template: auto (if the tokenizer has one), chat or none")
    template_kwargs: Mapping[str, Any] | None = rare(None, "what the template gets: '{enable_thinking: false}'")
    seed: int = option(0, "seed of everything that is drawn")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "of the forward: auto (bfloat16 on cuda), float32 or bfloat16")

    def __post_init__(self) -> None:
        convert_all(self)
        choose(self, "template", ("auto", "chat", "none"))
        check_template_kwargs(self)
        choose(self, "device", ("auto", "cpu", "cuda"))
        choose(self, "dtype", ("auto", "float32", "bfloat16"))
        at_least(self, 1, "max_tokens")
        at_least(self, 0, "seed")
        within(self, 0, 1, "max_rejected")
        if self.seed >= 2**31:
            raise UserError(f"seed must be below 2**31 = {2**31}, got {self.seed}")

    def resolve_device(self) -> torch.device:
        """The device of the run; raises ValueError for cuda without a GPU."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device is cuda, but torch sees no GPU")
        wanted = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        return torch.device(wanted)

    def autocast_dtype(self) -> torch.dtype | None:
        """dtype of the forward where it is not that of the fp32 weights."""
        half = self.dtype == "bfloat16" or (self.dtype == "auto" and self.resolve_device().type == "cuda")
        return torch.bfloat16 if half else None


@dataclass(frozen=True, kw_only=True)
class LoopConfig(JobConfig):
    """What every loop needs.

    may_change: of a run that is resumed; what else decides what it computes must stay"""

    may_change: ClassVar[tuple[str, ...]] = ("learning_rate", "schedule", "warmup_ratio")
    model: str = option(REQUIRED, "folder or hub id of the model to start from")
    data: str = option(REQUIRED, "JSONL, JSON or Parquet file, or a folder or glob of such (docs/data.md)")
    output: str = option(REQUIRED, "folder for checkpoints, metrics and the final model")
    batch_size: int = option(32, "sequences (reward: pairs; ppo: responses) a step")
    learning_rate: float = option(1e-5, "peak learning rate of AdamW")
    schedule: str = option("cosine", "of the learning rate: constant, linear or cosine (to 0)")
    warmup_ratio: float = option(0.03, "share of the steps in which the learning rate rises from 0")
    weight_decay: float = option(0.0, "decoupled weight decay of matrices")
    optimizer: str = rare("adamw", "adamw, or adamw8bit: moments of a byte each (bitsandbytes)")
    adam_eps: float = rare(1e-5, "epsilon of AdamW")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    limit: int | None = option(None, "use only so many rows of the data")
    save_every: int = option(100, "steps between checkpoints; 0: none")
    save_minutes: float = rare(
        None, "checkpoint at least every so many minutes; 0: off; default 15, or 0 if save_every is 0"
    )
    keep_checkpoints: int = option(2, "how many of them stay, the newest", rare=True)
    parallel: str = option("ddp", "under torchrun: ddp (a copy of each model a process) or fsdp (shards)", rare=True)
    gradient_checkpointing: bool = option(False, "recompute activations in backward to save memory")
    lora_rank: int = option(0, "train a low-rank adapter of this rank, and the head; 0: all weights")
    lora_alpha: float = rare(32.0, "what an adapter computes is multiplied by lora_alpha / lora_rank")
    lora_targets: str = rare("all", "linear layers with an adapter, such as q_proj,v_proj; all: those of the body")
    tensorboard: bool = option(False, "also write TensorBoard files")
    resume: bool = option(False, "continue from the newest checkpoint in the output folder")
    overwrite: bool = option(False, "delete an earlier run in the output folder")

    def __post_init__(self) -> None:
        if self.save_minutes is None:
            object.__setattr__(self, "save_minutes", 15.0 if str(self.save_every) != "0" else 0.0)
        super().__post_init__()
        choose(self, "schedule", SCHEDULES)
        choose(self, "parallel", ("ddp", "fsdp"))
        choose(self, "optimizer", ("adamw", "adamw8bit"))
        above(self, 0, "learning_rate", "adam_eps", "max_grad_norm", "lora_alpha")
        at_least(self, 1, "batch_size", "limit", "keep_checkpoints")
        at_least(self, 0, "weight_decay", "save_every", "save_minutes", "lora_rank")
        within(self, 0, 1, "warmup_ratio")
        if self.resume and self.overwrite:
            raise UserError("resume and overwrite exclude each other")
        if not self.has_adapters() and (self.lora_alpha, self.lora_targets) != (32.0, "all"):
            raise UserError("lora_alpha and lora_targets are of adapters, and there is none: set lora_rank")
        if self.parallel == "fsdp" and self.optimizer == "adamw8bit":
            raise UserError("parallel: fsdp cuts the moments of adamw only; adamw8bit takes ddp")
        if self.parallel == "fsdp" and self.has_adapters():
            raise UserError("parallel: fsdp is for models that are trained whole; adapters (lora_rank) take ddp")

    def has_adapters(self) -> bool:
        """Whether some model is trained as an adapter."""
        return self.lora_rank > 0

    def adapter_options(self) -> dict[str, Any]:
        """What an adapter is made with, but for its model."""
        return {"rank": self.lora_rank, "alpha": self.lora_alpha, "targets": self.lora_targets}


@dataclass(frozen=True, kw_only=True)
class TuningConfig(LoopConfig):
    """What the loops on a file of rows need besides."""

    may_change = ("epochs", *LoopConfig.may_change)
    epochs: int = option(1, "passes over the data")
    max_length: int = option(1024, "rows with a longer sequence are rejected")
    eval_data: str | None = option(None, "held-out file; metrics on it are reported after each epoch")
    eval_fraction: float = option(0.0, "without eval_data: hold out this share of the data, its last rows")
    eval_limit: int | None = option(None, "use only so many held-out rows")
    eval_every: int = option(0, "also evaluate after every so many steps; 0: after each epoch only")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "epochs", "eval_limit")
        at_least(self, 2, "max_length")
        at_least(self, 0, "eval_every")
        if self.eval_every and self.eval_data is None and not self.eval_fraction:
            raise UserError(f"eval_every ({self.eval_every}) needs held-out rows: set eval_data or eval_fraction")
        within(self, 0, 0.9, "eval_fraction")
        if self.eval_data is not None and self.eval_fraction:
            raise UserError(f"give eval_data ({self.eval_data}) or eval_fraction ({self.eval_fraction}), not both")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TuningConfig):
    """Supervised fine-tuning on demonstrations."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TuningConfig):
    """A reward model from responses that were judged."""

    objective: str = option("auto", "pairs, plackett_luce, all_pairs, outcome, ratings; auto: by the columns")
    share_prompts: bool = rare(True, "read a prompt once for all its responses, where the model allows it")
    label_smoothing: float = option(0.0, "pairs: share of labels believed wrong")
    center_coef: float = option(
        0.0, "pairs: weight of the mean squared sum of a pair's scores (0.01 keeps them near 0)"
    )
    center_bias: bool = option(
        True, "at the end, shift scores so that the best responses (of comparisons) score 0 on average"
    )
    center_data: str | None = option(None, "demonstrations that are to score 0 on average in place of those", rare=True)
    ties: str = option("skip", "all_pairs: responses of equal rank: skip, or half (a pair with target 1/2)", rare=True)
    head_init: str = option("normal", "weights of a new head: normal, N(0, 1 / (width + 1)), or zero", rare=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(self, "objective", ("auto", *OBJECTIVES))
        choose(self, "ties", ("skip", "half"))
        choose(self, "head_init", ("normal", "zero"))
        at_least(self, 0, "center_coef")
        within(self, 0, 0.5, "label_smoothing")
        if self.objective != "auto":
            self.check_objective(self.objective)

    def check_objective(self, objective: str) -> None:
        """Raises ValueError for an option that would have no effect."""
        for name, default, objectives in (
            ("label_smoothing", 0.0, ("pairs",)),
            ("center_coef", 0.0, ("pairs",)),
            ("ties", "skip", ("all_pairs",)),
            ("center_data", None, ("pairs", "plackett_luce", "all_pairs")),
        ):
            if getattr(self, name) != default and objective not in objectives:
                raise UserError(f"{name} has no effect on objective {objective}")
        if self.center_data is not None and not self.center_bias:
            raise UserError("center_data needs center_bias")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TuningConfig):
    """A policy from preference pairs or labelled responses."""

    learning_rate: float = option(1e-6, "peak learning rate of AdamW")
    loss: str = option("sigmoid", "sigmoid (DPO), ipo, hinge, simpo, orpo; of labelled responses: kto")
    beta: float = option(0.1, "tie to the reference (simpo: scale, often 2; orpo: weight of the odds)")
    reference: str | None = option(None, "folder or hub id of the reference (default: model)")
    reference_free: bool = option(False, "no reference (simpo, orpo: never one)", rare=True)
    length_normalized: bool = option(False, "means over tokens in place of sums (simpo, orpo: always)", rare=True)
    share_prompts: bool = rare(True, "read a prompt once for all its responses, where the model allows it")
    label_smoothing: float = option(0.0, "share of labels believed wrong (sigmoid: conservative DPO)")
    target_margin: float = option(0.0, "simpo: gamma, by how much the chosen response is to lead", rare=True)
    desirable_weight: float = rare(1.0, "kto: weight of the responses that are wanted")
    undesirable_weight: float = rare(1.0, "kto: weight of the others")
    sft_coef: float = option(
        0.0, "weight of the mean log-probability of chosen responses, added to the loss", rare=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(self, "loss", ("sigmoid", "ipo", "hinge", "simpo", "orpo", "kto"))
        above(self, 0, "beta")
        at_least(self, 0, "target_margin", "sft_coef", "desirable_weight", "undesirable_weight")
        within(self, 0, 0.5, "label_smoothing")
        for name, losses in {"label_smoothing": ("sigmoid",), "target_margin": ("simpo",)}.items():
            if getattr(self, name) and self.loss not in losses:
                raise UserError(f"{name} has no effect on loss {self.loss}")
        if self.loss == "kto" and (self.reference_free or self.length_normalized or self.sft_coef):
            raise UserError("loss kto has none of reference_free, length_normalized and sft_coef")
        if self.loss != "kto" and (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise UserError(f"desirable_weight and undesirable_weight have no effect on loss {self.loss}")
        if self.loss in ("simpo", "orpo") and (self.reference or self.reference_free or self.length_normalized):
            raise UserError(f"loss {self.loss} has no reference and takes means over tokens, leave those options out")
        if self.reference and self.reference_free:
            raise UserError(f"give reference ({self.reference}) or reference_free, not both")


def did_you_mean(name: str, known: list[str]) -> str:
    """A hint at the nearest known name, or nothing."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def choose(config: Any, name: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless the option has one of these values; so do the next three outside their bounds."""
    value = getattr(config, name)
    if value is not None and value not in choices:
        hint = did_you_mean(str(value), list(choices))
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")


def at_least(config: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < low:
            raise UserError(f"{name} must be at least {low}, got {value}")


def above(config: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= low:
            raise UserError(f"{name} must be above {low}, got {value}")


def within(config: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} must be between {low} and {high}, got {value}")
