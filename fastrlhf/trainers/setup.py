"""How a loop is made ready: its output folder, begun or resumed, its models, its rows. base.py has what follows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from fastrlhf.data import Loaded
from fastrlhf.data.statistics import warnings
from fastrlhf.errors import UserError
from fastrlhf.models.policy import Role
from fastrlhf.runtime import distributed, signals
from fastrlhf.runtime.checkpoint import fingerprint, load_state, restore_lines
from fastrlhf.runtime.metrics import MetricsLog
from fastrlhf.runtime.output_folder import OutputFolder
from fastrlhf.runtime.products import check_products
from fastrlhf.settings.training import LoopConfig, TuningConfig
from fastrlhf.trainers.base import CheckpointClock, Trainer, note_step, step_of

T = TypeVar("T")
R = TypeVar("R", bound=Role)


def prepare(config: LoopConfig) -> OutputFolder:
    """Joins the other processes of the run, if there are any, and seeds torch, numpy and Python: what a new head and a
    user's reward function draw from. Returns the output folder, which the first process holds.

    Raises: as OutputFolder and check_products; ValueError when the processes see different output folders."""
    if distributed.start() == 1 and config.parallel == "fsdp":
        raise UserError("parallel: fsdp needs several processes; torchrun starts them (docs/parallel.md)")
    folder = OutputFolder(config) if distributed.is_main_process() else None
    distributed.all_gather(None)
    folder = folder or OutputFolder(config, hold=False)
    found = distributed.all_gather(str(folder.checkpoint))  # none goes on, and writes there, before all have looked
    if len(set(found)) > 1:
        raise UserError(
            f"output: all processes must see the same folder {config.output}, but their newest "
            f"checkpoints are {', '.join(found)}"
        )
    if folder.is_resumed:
        check_products(folder.path)
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)
    random.seed(config.seed)
    return folder


def begin(loop: Trainer, data: Iterable[Sequence[int]]) -> None:
    """Opens the output folder of a loop that is otherwise ready, and takes up its checkpoint if there is one.

    data: the tokens of the rows, and what else they say, as sequences of numbers

    Raises: ValueError when the data is not that of the checkpoint, or more steps are done than there are to be."""
    config, checkpoint, changes = loop.config, loop.folder.checkpoint, loop.folder.changes
    loop.data_fingerprint = fingerprint(data)
    loop.num_steps_done = 0
    if checkpoint is not None:
        state = load_state(checkpoint)
        if state["data_fingerprint"] != loop.data_fingerprint:
            what = f"rows of {config.data}, or of a file beside it,"
            raise UserError(f"resume: {what} are no longer those of {checkpoint}")
        loop.num_steps_done = state["step"]
        loop.load_state_dict(state["loop"])
        loop.budget.load_state_dict(state["budget"])
        if loop.num_steps < loop.num_steps_done:
            steps = f"{loop.num_steps} steps are asked for, but {loop.num_steps_done} are done"
            raise UserError(f"resume: {steps}; give as many at least, or --overwrite to start anew")
        if loop.num_steps == loop.num_steps_done and changes and not changes[0].startswith(("steps ", "epochs ")):
            raise UserError(f"resume: {changes[0]}, but all {loop.num_steps} steps are done; give more, too")
    elif changes and (Path(config.output) / "model").exists():
        raise UserError(
            f"resume: {changes[0]}, but {config.output} has no checkpoint to go on from; start a run in another folder "
            f"with model={config.output}/model, or --overwrite to start anew"
        )
    if distributed.is_main_process():
        loop.folder.open()
        if checkpoint is not None:
            restore_lines(checkpoint)
        note_step(Path(config.output), "planned", loop.num_steps)
    loop.log = MetricsLog(
        config.output, num_steps=loop.num_steps, step=loop.num_steps_done, tensorboard=config.tensorboard
    )
    loop.clock = CheckpointClock(config.save_minutes)
    if checkpoint is not None:
        done = loop.num_steps_done == loop.num_steps
        loop.log.say(f"resuming from {checkpoint}" + (f": all {loop.num_steps} steps are done" if done else ""))
        for change in changes:
            loop.log.say(f"resume: {change}")
        best = Path(config.output) / "best"
        step = step_of(best)
        if loop.best and not best.exists():
            loop.log.say(f"warning: {best} is missing; it is written again when a later model is better")
        is_kept = step is not None and step <= loop.num_steps_done
        if distributed.all_gather(bool(changes) and best.exists() and not is_kept)[0]:
            of = "an unknown step" if step is None else "a later step"
            loop.log.say(f"resume: {best} is of {of}, and is replaced by the next model that is scored")
            loop.forget_best()
    elif config.resume:
        loop.log.say(f"no checkpoint in {config.output} to resume from: starting from the first step")
    signals.running(loop)


def load_trained(role: type[R], config: LoopConfig, checkpoint: Path | None, **options: Any) -> R:
    """Returns the model that a loop trains, whole or as an adapter, in train mode: as `model` or as in the checkpoint.

    options: of its from_pretrained"""
    options |= {"device": config.resolve_device(), "autocast": config.autocast_dtype()}
    options["gradient_checkpointing"] = config.gradient_checkpointing
    saved = checkpoint / "model" if checkpoint else None
    if not config.lora_rank:
        return role.from_pretrained(saved or config.model, **options).train()
    model = role.from_pretrained(config.model, freeze=True, dtype=options["autocast"] or torch.float32, **options)
    return model.adapt(saved, **config.adapter_options()).train()


def load_with_held_out(load: Callable[..., Loaded[T]], config: TuningConfig, tokenizer: Any) -> tuple[list[T], list[T]]:
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
