"""Settings of each loop: a frozen dataclass whose fields are also the keys of its YAML file and its CLI options.

What is given on the command line wins over the YAML file, and both over the preset and the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

SCHEDULES = ("constant", "linear", "cosine")
T = TypeVar("T")


def option(default: Any, help: str) -> Any:
    """A field with a line of help; without a default (dataclasses.MISSING) it must be given."""
    return dataclasses.field(default=default, metadata={"help": help})


REQUIRED = dataclasses.MISSING


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every loop needs."""

    model: str = option(REQUIRED, "folder or hub id of the model to start from")
    data: str = option(REQUIRED, "JSONL, JSONL.gz or Parquet file (docs/data.md)")
    output: str = option(REQUIRED, "folder for checkpoints, metrics and the final model")
    learning_rate: float = option(1e-5, "peak learning rate of AdamW")
    schedule: str = option("cosine", "constant, linear or cosine (to 0)")
    warmup_ratio: float = option(0.03, "share of the steps in which the learning rate rises from 0")
    weight_decay: float = option(0.0, "decoupled weight decay of matrices")
    adam_eps: float = option(1e-5, "epsilon of AdamW")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    batch_size: int = option(32, "sequences (reward: pairs; ppo: responses) a step")
    max_tokens: int = option(4096, "tokens a micro-batch; changes memory and speed, not results")
    limit: int | None = option(None, "use only the first rows of the data")
    max_rejected: float = option(0.01, "stop if a larger share of the rows is rejected")
    template: str = option("auto", "chat template: auto (if the tokenizer has one), chat or none")
    save_every: int = option(100, "steps between checkpoints")
    seed: int = option(0, "seed of everything that is drawn")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "auto (cuda: bfloat16, cpu: float32), float32 or bfloat16; weights stay float32")
    gradient_checkpointing: bool = option(False, "recompute activations in backward to save memory")
    tensorboard: bool = option(False, "also write TensorBoard files")
    resume: bool = option(False, "continue from the newest checkpoint in the output folder")
    overwrite: bool = option(False, "delete an earlier run in the output folder")

    def __post_init__(self) -> None:
        _choose(self, "schedule", SCHEDULES)
        _choose(self, "template", ("auto", "chat", "none"))
        _choose(self, "device", ("auto", "cpu", "cuda"))
        _choose(self, "dtype", ("auto", "float32", "bfloat16"))
        for name in ("learning_rate", "adam_eps", "max_grad_norm", "batch_size", "max_tokens", "save_every"):
            _at_least(self, name, 0, strict=True)
        for name in ("weight_decay", "seed"):
            _at_least(self, name, 0)
        for name in ("warmup_ratio", "max_rejected"):
            _within(self, name, 0, 1)
        if self.seed >= 2**31:
            raise ValueError(f"seed must be below 2**31, got {self.seed}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")

    def resolve_device(self) -> torch.device:
        """The device of the run; raises ValueError for cuda without a GPU."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no GPU")
        wanted = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        return torch.device(wanted)

    def autocast_dtype(self) -> torch.dtype | None:
        """dtype of the forward where it is not that of the fp32 weights."""
        half = self.dtype == "bfloat16" or (self.dtype == "auto" and self.resolve_device().type == "cuda")
        return torch.bfloat16 if half else None


@dataclass(frozen=True, kw_only=True)
class SFTConfig(LoopConfig):
    """Supervised fine-tuning on demonstrations."""

    epochs: int = option(1, "passes over the data")
    max_length: int = option(1024, "longer sequences are rejected")
    eval_data: str | None = option(None, "held-out file; its loss is reported at the end of each epoch")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, "epochs", 1)
        _at_least(self, "max_length", 2)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(LoopConfig):
    """A reward model on preference pairs."""

    epochs: int = option(1, "passes over the data")
    max_length: int = option(1024, "longer sequences are rejected")
    eval_data: str | None = option(None, "held-out file; its accuracy is reported at the end of each epoch")
    eval_fraction: float = option(0.0, "without eval_data: hold out this share of the data (its last rows)")
    label_smoothing: float = option(0.0, "share of labels believed wrong")
    center_coef: float = option(0.0, "weight of the mean squared score sum of a pair (0.01 keeps scores near 0)")
    center_bias: bool = option(True, "at the end, shift scores so that chosen responses score 0 on average")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, "epochs", 1)
        _at_least(self, "max_length", 2)
        _at_least(self, "center_coef", 0)
        _within(self, "label_smoothing", 0, 0.5)
        _within(self, "eval_fraction", 0, 0.9)


PRESETS: dict[str, dict[str, Any]] = {
    # Stiennon et al. and its reproduction; Ouyang et al. and today's chat trainers
    "summarize": {"learning_rate": 3e-6, "value_learning_rate": 3e-6, "epochs": 4, "kl_coef": 0.05, "lam": 0.95},
    "chat": {"learning_rate": 5e-7, "value_learning_rate": 9e-6, "epochs": 1, "kl_coef": 0.01, "lam": 1.0},
}


@dataclass(frozen=True, kw_only=True)
class PPOConfig(LoopConfig):
    """PPO with a critic against a reward, with a KL penalty to a reference model."""

    reward: str = option("", "reward model folder, module:function, or a sum SOURCE=WEIGHT,SOURCE=WEIGHT")
    reference: str | None = option(None, "model that the KL is measured to; default: model")
    preset: str = option("summarize", "summarize or chat: defaults of the options marked *")
    steps: int = option(100, "PPO steps")
    learning_rate: float | None = option(None, "* peak learning rate of the policy")  # type: ignore[assignment]
    value_learning_rate: float | None = option(None, "* peak learning rate of the value model")
    epochs: int | None = option(None, "* passes over the responses of a step")
    minibatches: int = option(1, "optimizer steps a pass")
    kl_coef: float | None = option(None, "* weight of the KL penalty in the reward")
    lam: float | None = option(None, "* trace decay of generalised advantage estimation")
    kl_target: float | None = option(None, "adapt kl_coef to reach this KL (nats a response); default: fixed")
    gamma: float = option(1.0, "discount")
    clip_range: float = option(0.2, "clip range of the probability ratio")
    clip_range_value: float = option(0.2, "clip range of the value's change")
    value_coef: float = option(0.1, "weight of the value loss")
    entropy_coef: float = option(0.0, "weight of the entropy bonus")
    whiten: bool = option(True, "whiten advantages over the response tokens of a step")
    missing_eos: str = option("none", "for responses that were cut off: none, subtract:V or replace:V")
    value_warmup_steps: int | None = option(
        None, "first steps that train only the value model; default: 0 from a reward model, else 2"
    )
    max_prompt_tokens: int = option(512, "longer prompts are rejected")
    max_new_tokens: int = option(128, "length at which responses are cut off")
    temperature: float = option(1.0, "of sampling and of training alike")
    max_slots: int = option(64, "sequences generated at a time")

    def __post_init__(self) -> None:
        _choose(self, "preset", tuple(PRESETS))
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        for name in ("steps", "epochs", "minibatches", "max_prompt_tokens", "max_new_tokens", "max_slots"):
            _at_least(self, name, 1)
        for name in ("value_learning_rate", "clip_range", "clip_range_value", "value_coef", "temperature"):
            _at_least(self, name, 0, strict=True)
        for name in ("kl_coef", "entropy_coef"):
            _at_least(self, name, 0)
        for name in ("gamma", "lam"):
            _within(self, name, 0, 1)
        if self.kl_target is not None and self.kl_target <= 0:
            raise ValueError(f"kl_target must be above 0, got {self.kl_target}")
        if self.minibatches > self.batch_size:
            raise ValueError(f"minibatches ({self.minibatches}) must not exceed batch_size ({self.batch_size})")


def parse(config_class: type[T], arguments: Sequence[str], *, program: str) -> T:
    """Returns the configuration of command-line arguments `--config FILE.yaml --key value ...`.

    Exits with a message (argparse) for an option that does not exist (naming the nearest), a value of the wrong type,
    or a missing required option; values that the configuration refuses end the same way."""
    kinds = typing.get_type_hints(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    parser = argparse.ArgumentParser(
        program,
        description=(config_class.__doc__ or "").strip(),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=118),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options as keys")
    for name, field in fields.items():
        default = "" if field.default in (REQUIRED, None, "") else f" [{field.default}]"
        needed = " (required)" if field.default is REQUIRED else ""
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            metavar="V",
            nargs="?" if kinds[name] is bool else None,
            const="true" if kinds[name] is bool else None,
            help=(field.metadata["help"] + default + needed).replace("%", "%%"),
        )
    dashed = [a.replace("_", "-", a.split("=")[0].count("_")) if a.startswith("--") else a for a in arguments]
    given, unknown = parser.parse_known_args(dashed)
    if unknown:
        parser.error(_unknown("option", unknown[0].split("=")[0], [f"--{n.replace('_', '-')}" for n in fields]))
    values = vars(given)
    try:
        if "config" in values:
            values = {**read_yaml(values.pop("config"), list(fields)), **values}
        values = {name: convert(name, value, kinds[name]) for name, value in values.items()}
        missing = [n for n, f in fields.items() if f.default is REQUIRED and n not in values]
        if missing:
            raise ValueError("missing " + ", ".join(f"--{name.replace('_', '-')}" for name in missing))
        return config_class(**values)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def read_yaml(path: str, names: list[str]) -> dict[str, Any]:
    """The settings in a YAML file; raises ValueError for a key that is not one of `names`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"config: no file {path!r}")
    with open(path, encoding="utf-8") as file:
        values = yaml.safe_load(file) or {}
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} must hold `key: value` lines, got {type(values).__name__}")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    for key in values:
        if key not in names:
            raise ValueError(f"config: {path}: " + _unknown("key", key, names))
    return values


def convert(name: str, value: Any, kind: Any) -> Any:
    """The value of an option as its type; raises ValueError naming the option."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options and (value is None or value == "none"):
        return None
    kind = next(k for k in options if k is not type(None))
    if kind is bool:
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise ValueError(f"{name} must be true or false, got {value!r}")
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be {kind.__name__}, got {value!r}") from None


def dump(config: Any) -> str:
    """The configuration as YAML."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _unknown(what: str, name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name.replace("_", "-") if what == "option" else name, known, n=1, cutoff=0.4)
    return f"unknown {what} {name}" + (f"; did you mean {nearest[0]}?" if nearest else "")


def _choose(config: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")


def _at_least(config: Any, name: str, low: float, strict: bool = False) -> None:
    value = getattr(config, name)
    if not (value > low if strict else value >= low):
        raise ValueError(f"{name} must be {'above' if strict else 'at least'} {low}, got {value}")


def _within(config: Any, name: str, low: float, high: float) -> None:
    value = getattr(config, name)
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
