"""What the trainers load: the model that they train, and the rows of a file with those held out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fastrlhf.data import Loaded
from fastrlhf.data.statistics import warnings
from fastrlhf.errors import UserError
from fastrlhf.models.policy import PackedModel
from fastrlhf.runtime import distributed
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.settings.training import DatasetTrainerConfig, TrainerConfig

T = TypeVar("T")
R = TypeVar("R", bound=PackedModel)


def load_trained(role: type[R], config: TrainerConfig, checkpoint: Path | None, **options: Any) -> R:
    """Returns the model that a loop trains, whole or as an adapter, in train mode: as `model` or as in the checkpoint.

    options: of its from_pretrained, device and autocast among them"""
    options["gradient_checkpointing"] = config.gradient_checkpointing
    saved = checkpoint / "model" if checkpoint else None
    if not config.lora_rank:
        return role.from_pretrained(saved or config.model, **options).train()
    model = role.from_pretrained(config.model, freeze=True, dtype=options["autocast"] or torch.float32, **options)
    return model.adapt(saved, **config.adapter_options()).train()


def make_optimizer(config: TrainerConfig, model: nn.Module, *, num_steps: int, **own: Any) -> Optimizer:
    """Returns the optimizer of a model. own: learning_rate and schedule where they are not those of the settings."""
    options: dict[str, Any] = {"learning_rate": config.learning_rate, "schedule": config.schedule}
    options |= {name: value for name, value in own.items() if value is not None}
    return Optimizer(
        model,
        num_steps=num_steps,
        warmup_ratio=config.warmup_ratio,
        weight_decay=config.weight_decay,
        eps=config.adam_eps,
        max_grad_norm=config.max_grad_norm,
        kind=config.optimizer,
        **options,
    )


def load_with_held_out(
    load: Callable[..., Loaded[T]], config: DatasetTrainerConfig, tokenizer: Any
) -> tuple[list[T], list[T]]:
    """Returns the rows to train on and the held-out rows, which are those of eval_data or the last of the data.

    Prints how many rows of each file are used, why others are not, and which are repeated."""
    options: dict[str, Any] = {"max_tokens": config.max_length, "max_rejected": config.max_rejected}
    options |= {"template": config.template, "template_kwargs": config.template_kwargs}
    loaded = load(config.data, tokenizer, limit=config.limit, **options)
    distributed.print_once(loaded.report)
    rows = loaded.rows
    if config.eval_data is not None:
        other = load(config.eval_data, tokenizer, limit=config.eval_limit, **options)
        distributed.print_once(other.report)
        held_out = other.rows
    else:
        num_held_out = round(config.eval_fraction * len(rows))
        if config.eval_fraction and not 0 < num_held_out < len(rows):
            raise UserError(f"eval_fraction {config.eval_fraction} of {len(rows)} rows leaves none on one side")
        start = len(rows) - num_held_out
        rows, held_out = rows[:start], rows[start:][: config.eval_limit]
    for line in warnings(rows, held_out):
        distributed.print_once(line)
    return rows, held_out


def check_fits(model: Any, tokenizer: Any, **lengths: int) -> None:
    """Raises ValueError unless the model embeds every token of the tokenizer and its context holds the lengths' sum.

    model: a transformers model; lengths: by option, the parts of the longest sequence"""
    embedded, name = model.get_input_embeddings().num_embeddings, model.name_or_path or type(model).__name__
    if len(tokenizer) > embedded:
        raise UserError(f"{name}: the tokenizer has {len(tokenizer)} tokens, but the model embeds only {embedded}")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and sum(lengths.values()) > context:
        sizes = " + ".join(f"{name} ({value})" for name, value in lengths.items())
        raise UserError(f"{sizes} must not exceed the model's context of {context} tokens ({name})")
