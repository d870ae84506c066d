"""What all loops share: doing steps in turn, with a checkpoint when one is due, and the model at the end."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fastrlhf.loops.budget import Budget
from fastrlhf.loops.memory_plan import Plan
from fastrlhf.runs import ranks, signals
from fastrlhf.runs.checkpoint import newest_checkpoint, save_checkpoint
from fastrlhf.runs.metrics import MetricsLog
from fastrlhf.runs.optim import NonFiniteError
from fastrlhf.runs.output import OutputFolder
from fastrlhf.runs.whole import remove, write_whole
from fastrlhf.settings.training import LoopConfig

MAX_SHARE = 0.05  # of a run's time that is spent on checkpoints, before another one is due by the clock


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
    budget: Budget
    plan: Plan | None
    folder: OutputFolder
    best: dict[str, Any]
    num_steps_done: int
    data_fingerprint: int
    log: MetricsLog
    clock: Clock
    scores_start = True  # whether held-out data is scored before the first step, too
    is_closed = False
    is_in_step = False  # after an exception, too, that came in the middle of a step

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
        checkpoint, when the command line was asked to stop; ValueError after `close`."""
        if self.num_steps_done >= self.num_steps:
            self._finish()
            raise StopIteration
        if self.is_closed:
            raise ValueError(f"{type(self).__name__} is closed: make it anew with resume=True to go on")
        self.folder.check()
        try:
            return self._next()
        except NonFiniteError as error:
            good = newest_checkpoint(self.config.output)
            advice = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            raise NonFiniteError(f"{error}; {advice}") from error

    def _next(self) -> dict[str, float]:
        if self.scores_start and self.num_steps_done == 0 and not self.is_in_step:
            self._record(self.held_out_metrics(0))
        self.is_in_step = True
        metrics = self.step()
        self.num_steps_done += 1
        self.is_in_step = False
        self._record(metrics)
        is_last = self.num_steps_done == self.num_steps
        asked = ranks.gather((signals.pending(), self.clock.is_due()))  # so that all processes do the same
        stop, by_clock = max(signal for signal, _ in asked), asked[0][1]
        if stop or by_clock or self._is_due_by_steps(is_last):
            self.save_checkpoint()
        if is_last:
            self._finish()
            if self.plan is not None:
                self.log.say(self.plan.outcome())
        elif stop:
            ranks.gather(None)  # or torchrun would end the first process, which writes, when another one is gone
            raise signals.Interrupted(stop)
        return metrics

    def _record(self, metrics: dict[str, float]) -> None:
        """Logs the metrics after num_steps_done steps, and writes the model if it is the best so far."""
        if metrics:
            self.log.add(self.num_steps_done, metrics)
        if metrics.get("eval/best_step") == self.num_steps_done:
            write_whole(Path(self.config.output) / "best", self.save)

    def _is_due_by_steps(self, is_last: bool) -> bool:
        every = self.config.save_every
        return bool(every and self.num_steps_done % every == 0) or (is_last and bool(every or self.config.save_minutes))

    def _finish(self) -> None:
        """Writes the final model, unless it is there, and closes."""
        if self.is_closed:
            return
        if ranks.gather(_is_outdated(Path(self.config.output)))[0]:
            write_whole(Path(self.config.output) / "model", self.save)
        self.close()

    def save_checkpoint(self) -> Path:
        """Writes a checkpoint of the steps done so far, from which resume=True goes on. Returns its folder.

        Raises: ValueError when the last step was broken off: weights and optimizer may be half-way through it."""
        output = Path(self.config.output)
        if self.is_in_step:
            good = newest_checkpoint(output)
            where = f"the newest one is {good}" if good else "there is none yet"
            raise ValueError(f"no checkpoint: step {self.num_steps_done + 1} was broken off half-way; {where}")
        begun = time.monotonic()
        state = {"loop": self.state_dict(), "data_fingerprint": self.data_fingerprint}
        state["budget"] = self.budget.state_dict()
        keep = self.config.keep_checkpoints
        folder = save_checkpoint(output, self.num_steps_done, self.save_models, keep=keep, **state)
        self.clock.saved(time.monotonic() - begun)
        return folder

    def forget_best(self) -> None:
        """Deletes the best model so far, of a step that is done again, and otherwise, by a run whose plan changed."""
        self.best.clear()
        self.save_checkpoint()  # first, or a kill would bring back the score of what is deleted
        if ranks.is_first():
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


class Clock:
    """Says when a checkpoint is due by the time, so that no more than `minutes` of work are lost; 0: never.

    It waits longer where all checkpoints of the process so far, and another one as long as the last, would take more
    than MAX_SHARE of its time."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.begun = self.last = time.monotonic()
        self.seconds = self.seconds_of_last = 0.0

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        now = time.monotonic()
        if not self.minutes or now - self.last < 60 * self.minutes:
            return False
        return self.seconds + self.seconds_of_last <= MAX_SHARE * (now - self.begun)

    def saved(self, seconds: float) -> None:
        """Takes note of a checkpoint, and of how long it took."""
        self.last = time.monotonic()
        self.seconds, self.seconds_of_last = self.seconds + seconds, seconds


def _is_outdated(output: Path) -> bool:
    """Whether the final model is missing, or that of a run that has been extended since: one killed after its last
    checkpoint, before the model was replaced."""
    newest, model = newest_checkpoint(output), output / "model"
    return not model.exists() or (newest is not None and is_newer(newest, model))


def is_newer(folder: Path, other: Path) -> bool:
    """Whether files were last added to a folder after they were to the other."""
    return folder.stat().st_mtime_ns > other.stat().st_mtime_ns
