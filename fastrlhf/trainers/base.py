"""What all loops share: doing steps in turn, with a checkpoint when one is due, and the model at the end."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from fastrlhf.errors import NonFiniteError, UserError, UserFunctionError
from fastrlhf.runtime import distributed, products, signals
from fastrlhf.runtime.atomic_io import remove, write_json, write_whole
from fastrlhf.runtime.checkpoint import checkpoint_name, newest_checkpoint, save_checkpoint
from fastrlhf.runtime.metrics import MetricsLog
from fastrlhf.runtime.output_folder import STEPS, OutputFolder
from fastrlhf.settings.training import LoopConfig
from fastrlhf.trainers.memory_plan import Plan
from fastrlhf.trainers.oom import TokenBudget

MAX_SHARE = 0.05  # of a run's time that is spent on checkpoints, before another one is due by the clock
WRITE_SPEED = 1e8  # bytes a second of the first checkpoint, as a cautious guess


class Trainer(ABC):
    """A loop: an iterator over its steps, which yields their metrics. loop.py makes it ready (`prepare`, `begin`).

    A caller who leaves early keeps what was done by asking for it, and lets the output folder go:

        with PPO(config) as ppo:
            for metrics in ppo:
                if metrics["objective/kl"] > 20:
                    ppo.save_checkpoint()  # for resume=True; or ppo.save(folder): the model
                    break

    best: step and score of the model in best/, empty if there is none
    `begin` sets num_steps_done, data_fingerprint, log and clock."""

    config: LoopConfig
    num_steps: int
    budget: TokenBudget
    plan: Plan | None
    folder: OutputFolder
    best: dict[str, Any]
    num_steps_done: int
    data_fingerprint: int
    log: MetricsLog
    clock: CheckpointClock
    scores_start = True  # whether held-out data is scored before the first step, too
    is_closed = False
    updates_at_once = True  # whether a step changes what a checkpoint holds from its first line on
    is_in_step = False  # whether it is changing; True after an exception that came in the middle of that, too

    @abstractmethod
    def step(self) -> dict[str, float]:
        """Does one step and returns its metrics, deterministic values only, among them num_tokens (for tokens/s)."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the model that the loop makes, with its tokenizer; all processes call it, the first one writes."""

    @abstractmethod
    def save_models(self, folder: Path) -> None:
        """Writes the models that a checkpoint needs, likewise."""

    @abstractmethod
    def checkpoint_bytes(self) -> int:
        """About how many bytes a checkpoint takes: weights and moments."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Optimizers and whatever else changes from step to step."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what state_dict gave."""

    def held_out_metrics(self, step: int) -> dict[str, float]:
        """The metrics of held-out data after a step; those of step 0 are of the model that the run starts from, which
        may be the best one."""
        return {}

    def __iter__(self) -> Iterator[dict[str, float]]:
        return self

    def __next__(self) -> dict[str, float]:
        """Does the next step; logs its metrics, writes a checkpoint when one is due, the model that answered held-out
        prompts best so far, and the final model after the last step.

        Raises: StopIteration after the last step; NonFiniteError, naming the newest checkpoint; Interrupted, after a
        checkpoint, when the command line was asked to stop; ValueError after `close`, and after an exception in the
        middle of a step; RuntimeError when another run of the process has taken the output folder."""
        if self.num_steps_done >= self.num_steps:
            self._finish()
            raise StopIteration
        self._check_can_go_on()
        try:
            return self._next()
        except NonFiniteError as error:
            good = newest_checkpoint(self.config.output)
            advice = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            raise NonFiniteError(f"{error}; {advice}") from error
        except StopIteration as error:  # of a function of the user's; it would end the loop as if it were done
            raise UserFunctionError(f"step {self.num_steps_done + 1} was broken off by a StopIteration") from error

    def _check_can_go_on(self) -> None:
        """Raises unless the loop is open, holds its output folder, and is between two steps."""
        if self.is_closed:
            raise UserError(f"{type(self).__name__} is closed: make it anew with resume=True to go on")
        self.folder.check()
        if self.is_in_step:
            good = newest_checkpoint(self.config.output)
            advice = f"with resume=True to go on from {good}" if good else "with overwrite=True, there is no checkpoint"
            raise UserError(
                f"step {self.num_steps_done + 1} was broken off half-way, so the weights are neither those before it "
                f"nor those after it: make {type(self).__name__} anew {advice}"
            )

    def _next(self) -> dict[str, float]:
        if self.scores_start and self.num_steps_done == 0:
            self._record(self.held_out_metrics(0))
        self.is_in_step = self.updates_at_once
        try:
            metrics = self.step()
        except (Exception, signals.Interrupted):
            self._keep_earlier_steps()
            raise
        self.num_steps_done += 1
        self.is_in_step = False
        self._record(metrics)
        is_last = self.num_steps_done == self.num_steps
        asked = distributed.all_gather(
            (signals.pending(), self.clock.is_due(self.checkpoint_bytes))
        )  # so that all processes do the same
        stop, by_clock = max(signal for signal, _ in asked), asked[0][1]
        if stop or by_clock or self._is_due_by_steps(is_last):
            self.save_checkpoint()
        if is_last:
            self._write_model("model")
            self.close()
            if self.plan is not None:
                self.log.say(self.plan.outcome())
        elif stop:
            distributed.all_gather(
                None
            )  # or torchrun would end the first process, which writes, when another one is gone
            raise signals.Interrupted(stop)
        return metrics

    def _keep_earlier_steps(self) -> None:
        """Leaves a checkpoint of the steps before one that failed before it changed anything, unless there is one.

        Several processes leave none: the others of them may not have failed."""
        newest = newest_checkpoint(self.config.output)
        is_kept = newest is not None and newest.name == checkpoint_name(self.num_steps_done)
        if self.num_steps_done and not (self.is_in_step or is_kept or distributed.rank_and_world_size()[1] > 1):
            with suppress(OSError):  # the error that is under way matters more
                self.save_checkpoint()

    def _record(self, metrics: dict[str, float]) -> None:
        """Logs the metrics after num_steps_done steps, and writes the model if it is the best so far."""
        if metrics:
            self.log.add(self.num_steps_done, metrics)
        if metrics.get("eval/best_step") == self.num_steps_done:
            self._write_model("best")

    def _is_due_by_steps(self, is_last: bool) -> bool:
        every = self.config.save_every
        return bool(every and self.num_steps_done % every == 0) or (is_last and bool(every or self.config.save_minutes))

    def _finish(self) -> None:
        """Writes the final model of a run that was done already, unless it is there, and closes."""
        if self.is_closed:
            return
        # it may be that of a run that has been extended since, and was killed before its model was replaced
        if distributed.all_gather(step_of(Path(self.config.output) / "model") != self.num_steps_done)[0]:
            self._write_model("model")
        self.close()

    def _write_model(self, name: str) -> None:
        """Writes <output>/name, the model as it is now, and then its step into steps.json beside it, and its files into
        products.json."""
        output = Path(self.config.output)
        note_step(output, name, None)
        if distributed.is_main_process():
            products.forget(output, name)
        write_whole(output / name, self.save)
        note_step(output, name, self.num_steps_done)
        if distributed.is_main_process():
            products.record(output, name)

    def save_checkpoint(self) -> Path:
        """Writes a checkpoint of the steps done so far, from which resume=True goes on. Returns its folder.

        Raises: ValueError after `close`, and after an exception in the middle of a step; RuntimeError when another run
        of the process has taken the output folder."""
        self._check_can_go_on()
        output, begun = Path(self.config.output), time.monotonic()
        state = {"loop": self.state_dict(), "data_fingerprint": self.data_fingerprint}
        state["budget"] = self.budget.state_dict()
        keep = self.config.keep_checkpoints
        folder = save_checkpoint(output, self.num_steps_done, self.save_models, keep=keep, **state)
        self.clock.saved(time.monotonic() - begun)
        return folder

    def forget_best(self) -> None:
        """Deletes best/. A run whose plan changed calls this when best/ is of a step that it will do again."""
        self.best.clear()
        self.save_checkpoint()  # first, or a kill would bring back the score of what is deleted
        note_step(Path(self.config.output), "best", None)
        if distributed.is_main_process():
            products.forget(Path(self.config.output), "best")
            remove(Path(self.config.output) / "best")

    def close(self) -> None:
        """Lets go of what the loop holds, the output folder among it. Its models can still be used and saved, but there
        are no further steps."""
        self.is_closed = True
        signals.ended(self)
        self.log.close()
        self.folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(self) -> None:
        """Does all steps, and closes, whatever happens."""
        with self:
            for _ in self:
                pass


class CheckpointClock:
    """Says when a checkpoint is due by the time, so that no more than `minutes` of work are lost; 0: never.

    It waits longer where all checkpoints of the process so far, and another one as long as the last, would take more
    than MAX_SHARE of its time. How long the first one takes is estimated from its bytes."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.begun = self.last = time.monotonic()
        self.seconds = 0.0
        self.seconds_of_last: float | None = None

    def is_due(self, num_bytes: Callable[[], int]) -> bool:
        """Whether it is time for a checkpoint; num_bytes: says how many bytes one takes."""
        now = time.monotonic()
        if not self.minutes or now - self.last < 60 * self.minutes:
            return False
        next_one = num_bytes() / WRITE_SPEED if self.seconds_of_last is None else self.seconds_of_last
        return self.seconds + next_one <= MAX_SHARE * (now - self.begun)

    def saved(self, seconds: float) -> None:
        """Takes note of a checkpoint, and of how long it took."""
        self.last = time.monotonic()
        self.seconds, self.seconds_of_last = self.seconds + seconds, seconds


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """How many bytes tensors take; of sharded ones, all shards together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def step_of(folder: Path) -> int | None:
    """After which step <output>/model or best was written, as steps.json says; None if it is not there, or unknown."""
    step = _noted(folder.parent).get(folder.name)
    return step if isinstance(step, int) and folder.exists() else None


def _noted(output: Path) -> dict[str, Any]:
    try:
        found = json.loads((output / STEPS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none was written, or it is damaged
        return {}
    return found if isinstance(found, dict) else {}


def note_step(output: Path, name: str, step: int | None) -> None:
    """Notes the step of a model in the output folder, or that it is no longer known, or how many steps are planned; the
    first process does."""
    noted = _noted(output) if distributed.is_main_process() else {}
    if distributed.is_main_process() and noted.get(name) != step:
        write_json(output / STEPS, {**noted, name: step})
