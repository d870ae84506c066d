"""The life of a loop around its steps: begin or resume, log, checkpoint, write the final model.

A loop is an object with a configuration, a number of steps and a method `step`, which loops on a file of rows inherit
from training.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from fastrlhf.data import Loaded
from fastrlhf.data.statistics import warnings
from fastrlhf.loops.budget import Budget
from fastrlhf.loops.memory_plan import Plan
from fastrlhf.models.policy import Role
from fastrlhf.runs import ranks
from fastrlhf.runs.checkpoint import fingerprint, load_state, newest_checkpoint, restore_lines, save_checkpoint
from fastrlhf.runs.metrics import MetricsLog
from fastrlhf.runs.optim import NonFiniteError
from fastrlhf.runs.output import OutputFolder
from fastrlhf.runs.whole import write_whole
from fastrlhf.settings.training import LoopConfig, TuningConfig

T = TypeVar("T")
R = TypeVar("R", bound=Role)


class Loop(Protocol):
    """What `begin` and `advance` need of a loop; they set the last three attributes. folder: what prepare returned."""

    @property
    def config(self) -> LoopConfig: ...

    @property
    def num_steps(self) -> int: ...

    budget: Budget
    plan: Plan | None
    folder: OutputFolder
    num_steps_done: int
    data_fingerprint: int
    log: MetricsLog

    def step(self) -> dict[str, float]:
        """Does one step and returns its metrics, deterministic values only, among them num_tokens (for tokens/s)."""

    def save(self, folder: Path) -> None:
        """Writes the model that the loop makes, with its tokenizer; all processes call it, the first one writes."""

    def save_models(self, folder: Path) -> None:
        """Writes the models that a checkpoint needs, likewise."""

    def state_dict(self) -> dict[str, Any]:
        """Optimizers and whatever else changes from step to step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what state_dict gave."""


def prepare(config: LoopConfig) -> OutputFolder:
    """Joins the other processes of the run, if there are any, and seeds torch, numpy and Python: what a new head and a
    user's reward function draw from. Returns the output folder, which the first process holds.

    Raises: as OutputFolder; ValueError when the processes see different output folders."""
    if ranks.start() == 1 and config.parallel == "fsdp":
        raise ValueError("parallel: fsdp needs several processes; torchrun starts them (docs/parallel.md)")
    folder = OutputFolder(config) if ranks.is_first() else None
    ranks.gather(None)
    folder = folder or OutputFolder(config, hold=False)
    found = ranks.gather(str(folder.checkpoint))  # none goes on, and writes there, before all have looked
    if len(set(found)) > 1:
        raise ValueError(
            f"output: all processes must see the same folder {config.output}, but their newest "
            f"checkpoints are {', '.join(found)}"
        )
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)
    random.seed(config.seed)
    return folder


def begin(loop: Loop, data: Iterable[Sequence[int]]) -> None:
    """Opens the output folder of a loop that is otherwise ready, and takes up its checkpoint if there is one.

    data: the tokens of the rows, and what else they say, as sequences of numbers

    Raises: ValueError when the data is not that of the checkpoint."""
    config, checkpoint = loop.config, loop.folder.checkpoint
    loop.data_fingerprint = fingerprint(data)
    loop.num_steps_done = 0
    if checkpoint is not None:
        state = load_state(checkpoint)
        if state["data_fingerprint"] != loop.data_fingerprint:
            what = f"rows of {config.data}, or of a file beside it,"
            raise ValueError(f"resume: {what} are no longer those of {checkpoint}")
        loop.load_state_dict(state["loop"])
        loop.budget.load_state_dict(state["budget"])
        loop.num_steps_done = state["step"]
    if ranks.is_first():
        loop.folder.open()
        if checkpoint is not None:
            restore_lines(checkpoint)
    loop.log = MetricsLog(
        config.output, num_steps=loop.num_steps, step=loop.num_steps_done, tensorboard=config.tensorboard
    )
    if checkpoint is not None:
        loop.log.say(f"resuming from {checkpoint}")
    elif config.resume:
        loop.log.say(f"no checkpoint in {config.output} to resume from: starting from the first step")


def advance(loop: Loop) -> dict[str, float]:
    """Does the next step of a loop and returns its metrics; this is the `__next__` of every loop.

    Logs the metrics, writes a checkpoint when one is due, the model that answered held-out prompts best so far, and the
    final model after the last step.

    Raises: StopIteration after the last step; NonFiniteError, naming the newest checkpoint."""
    try:
        return _next_step(loop)
    except NonFiniteError as error:
        good = newest_checkpoint(loop.config.output)
        advice = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise NonFiniteError(f"{error}; {advice}") from error


def _next_step(loop: Loop) -> dict[str, float]:
    output = Path(loop.config.output)
    if loop.num_steps_done >= loop.num_steps:
        if ranks.gather((output / "model").exists())[0] is False:  # killed after the last checkpoint
            write_whole(output / "model", loop.save)
        loop.folder.close()
        raise StopIteration
    loop.folder.check()
    metrics = loop.step()
    loop.num_steps_done += 1
    loop.log.add(loop.num_steps_done, metrics)
    if metrics.get("eval/best_step") == loop.num_steps_done:
        write_whole(output / "best", loop.save)
    last, every = loop.num_steps_done == loop.num_steps, loop.config.save_every
    if every and (last or loop.num_steps_done % every == 0):
        state = {"loop": loop.state_dict(), "data_fingerprint": loop.data_fingerprint}
        state["budget"] = loop.budget.state_dict()
        save_checkpoint(output, loop.num_steps_done, loop.save_models, keep=loop.config.keep_checkpoints, **state)
    if last:
        write_whole(output / "model", loop.save)
        if loop.plan is not None:
            loop.log.say(loop.plan.outcome())
    return metrics


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
    options = {"max_tokens": config.max_length, "template": config.template, "max_rejected": config.max_rejected}
    loaded = load(config.data, tokenizer, limit=config.limit, **options)
    ranks.say(loaded.report)
    rows = loaded.rows
    if config.eval_data is not None:
        other = load(config.eval_data, tokenizer, limit=config.eval_limit, **options)
        ranks.say(other.report)
        held_out = other.rows
    else:
        num_held_out = round(config.eval_fraction * len(rows))
        if config.eval_fraction and not 0 < num_held_out < len(rows):
            raise ValueError(f"eval_fraction {config.eval_fraction} of {len(rows)} rows leaves none on one side")
        start = len(rows) - num_held_out
        rows, held_out = rows[:start], rows[start:][: config.eval_limit]
    for line in warnings(rows, held_out):
        ranks.say(line)
    return rows, held_out


def check_fits(model: Any, tokenizer: Any, **lengths: int) -> None:
    """Raises ValueError unless the model embeds every token of the tokenizer and its context holds the lengths' sum.

    model: a transformers model; lengths: by option, the parts of the longest sequence"""
    embedded, name = model.get_input_embeddings().num_embeddings, model.name_or_path or type(model).__name__
    if len(tokenizer) > embedded:
        raise ValueError(f"{name}: the tokenizer has {len(tokenizer)} tokens, but the model embeds only {embedded}")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and sum(lengths.values()) > context:
        sizes = " + ".join(f"{name} ({value})" for name, value in lengths.items())
        raise ValueError(f"{sizes} must not exceed the model's context of {context} tokens ({name})")


def ends_epoch(step: int, batch_size: int, num_rows: int, num_steps: int) -> bool:
    """Whether step 0, 1, ... is the last of the run or takes the last row of an epoch."""
    return step + 1 == num_steps or (step + 1) * batch_size // num_rows > step * batch_size // num_rows
