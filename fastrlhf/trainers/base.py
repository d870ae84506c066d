"""What all trainers share: set up, restore a checkpoint, do the steps, evaluate, write checkpoints and the model."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from fastrlhf.data.template import load_tokenizer
from fastrlhf.errors import NonFiniteError, UserError, UserFunctionError
from fastrlhf.runtime import checkpoint as checkpoints
from fastrlhf.runtime import distributed, signals
from fastrlhf.runtime.atomic_io import remove
from fastrlhf.runtime.fingerprints import fingerprint_tokens
from fastrlhf.runtime.metrics import MetricsLog
from fastrlhf.runtime.output_folder import start_run
from fastrlhf.runtime.resume_hint import extending
from fastrlhf.runtime.saved_models import forget_model, note_step, step_of, write_model
from fastrlhf.settings.training import TrainerConfig
from fastrlhf.trainers.inspection import Inspection
from fastrlhf.trainers.memory_plan import Plan
from fastrlhf.trainers.token_budget import TokenBudget


class Trainer(Inspection, Iterator[dict[str, float]]):
    """Trains a model; iterate over it: each step yields its metrics. `run` does all steps.

    A caller who leaves early keeps what was done by asking for it, and lets the output folder go:

        with PPO(config) as ppo:
            for metrics in ppo:
                if metrics["objective/kl"] > 20:
                    ppo.save_checkpoint()  # for resume=True; or ppo.save(folder): the model
                    break

    num_steps, num_steps_done: of the whole run, and so far; final_model: what the run leaves
    best: step and score of the model in best/, empty if there is none
    log: prints, and writes metrics.jsonl; budget: tokens a micro-batch; plan: of memory

    Raises: what the configuration, the data, the models or the output folder are refused for, before training begins;
    NonFiniteError when a loss or a gradient is not finite."""

    config: TrainerConfig
    num_steps: int
    plan: Plan | None
    log: MetricsLog
    clock: checkpoints.CheckpointClock
    evaluates_start = True  # whether held-out data is scored before the first step, too
    updates_at_once = True  # whether a step changes what a checkpoint holds from its first line on
    is_closed = False
    is_in_step = False  # whether it is changing; True after an exception that came in the middle of that, too

    def __init__(self, config: TrainerConfig) -> None:
        self.config = config
        self.best: dict[str, Any] = {}
        self.num_steps_done = 0
        self.output, self.folder = Path(config.output), start_run(config)
        self.checkpoint = self.folder.checkpoint  # that the run goes on from; None for a new run
        self.placement, self.tokenizer = config.placement(), load_tokenizer(config.tokenizer or config.model)
        self.device = self.placement["device"]
        self.budget = TokenBudget(config.max_tokens)
        self.set_up()
        self.restore()

    @abstractmethod
    def set_up(self) -> None:
        """Reads the data, loads the models (those of `checkpoint`, if there is one) and makes the optimizers."""

    @abstractmethod
    def fingerprint_rows(self) -> Iterable[Sequence[int]]:
        """What a resumed run must read as the run before it did: the tokens of the rows, and what else they say."""

    @abstractmethod
    def step(self) -> dict[str, float]:
        """Does one step and returns its metrics, deterministic values only, among them num_tokens (for tokens/s)."""

    @abstractmethod
    def is_eval_due(self, step: int) -> bool:
        """Whether to evaluate after a step; step 0 is the start."""

    def end_step(self, metrics: dict[str, float]) -> None:
        """What follows a step and its evaluation; may add metrics."""

    def save(self, folder: str | Path) -> None:
        """Writes final_model and the tokenizer as transformers loads them; all processes call it, the first writes."""
        self.final_model.save_pretrained(folder)
        if distributed.is_main_process():
            self.tokenizer.save_pretrained(folder)

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

    def restore(self) -> None:
        """Takes up the checkpoint, if there is one, and opens the output folder.

        Raises: UserError when the data is not that of the checkpoint, or more steps are done than there are to be."""
        config, changes = self.config, [*self.folder.changes.values()]
        self.data_fingerprint = fingerprint_tokens(self.fingerprint_rows())
        if self.checkpoint is not None:
            self._load_checkpoint(self.checkpoint)
        elif changes and (self.output / "model").exists():
            raise UserError(
                f"resume: {changes[0]}, but {config.output} has no checkpoint to go on from; start a run "
                f"in another folder with model={config.output}/model, or --overwrite to start anew"
            )
        if distributed.is_main_process():
            self.folder.open()
            if self.checkpoint is not None:
                checkpoints.restore_lines(self.checkpoint)
            note_step(self.output, "planned", self.num_steps)
        counts = {"num_steps": self.num_steps, "step": self.num_steps_done}
        self.log = MetricsLog(self.output, **counts, tensorboard=config.tensorboard)
        self.clock = checkpoints.CheckpointClock(config.save_minutes)
        self._print_start()
        signals.defer_signals_for(self)

    def _load_checkpoint(self, checkpoint: Path) -> None:
        state, changes = checkpoints.load_state(checkpoint), self.folder.changes
        if state["data_fingerprint"] != self.data_fingerprint:
            what = f"rows of {self.config.data}, or of a file beside it,"
            raise UserError(f"resume: {what} are no longer those of {checkpoint}")
        self.num_steps_done = state["step"]
        self.load_state_dict(state["loop"])
        self.budget.load_state_dict(state["budget"])
        if self.num_steps < self.num_steps_done:
            steps = f"{self.num_steps} steps are asked for, but {self.num_steps_done} are done"
            raise UserError(f"resume: {steps}; give as many at least, or --overwrite to start anew")
        if self.num_steps == self.num_steps_done and changes and not {"steps", "epochs"} & {*changes}:
            change = next(iter(changes.values()))
            raise UserError(f"resume: {change}, but all {self.num_steps} steps are done; give more, too")

    def _print_start(self) -> None:
        """Prints from where a resumed run goes on and what changed, and what of best/ is no longer right."""
        if self.checkpoint is None:
            if self.config.resume:
                self.log.say(f"no checkpoint in {self.output} to resume from: starting from the first step")
            return
        done, changes = self.num_steps_done == self.num_steps, self.folder.changes
        extend = f": all {self.num_steps} steps are done; {extending(self.config)} extends the run"
        self.log.say(f"resuming from {self.checkpoint}{extend if done else ''}")
        for change in changes.values():
            self.log.say(f"resume: {change}")
        best, step = self.output / "best", step_of(self.output / "best")
        if self.best and not best.exists():
            self.log.say(f"warning: {best} is missing; it is written again when a later model is better")
        is_kept = step is not None and step <= self.num_steps_done
        if distributed.all_gather(bool(changes) and best.exists() and not is_kept)[0]:
            of = "an unknown step" if step is None else "a later step"
            self.log.say(f"resume: {best} is of {of}, and is replaced by the next model that is scored")
            self._forget_best()

    def __next__(self) -> dict[str, float]:
        """Does the next step; logs its metrics, writes a checkpoint when one is due, the model that answered held-out
        prompts best so far, and the final model after the last step.

        Raises: StopIteration after the last step; NonFiniteError, naming the newest checkpoint; Interrupted, after a
        checkpoint, when the command line was asked to stop; UserError after `close`, and after an exception in the
        middle of a step; MachineError when another run of the process has taken the output folder."""
        if self.num_steps_done >= self.num_steps:
            self._finish()
            raise StopIteration
        self._check_can_go_on()
        try:
            metrics = self._do_step()
        except NonFiniteError as error:
            good = checkpoints.newest_checkpoint(self.output)
            advice = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            raise NonFiniteError(f"{error}; {advice}") from error
        except StopIteration as error:  # of a function of the user's; it would end the loop as if it were done
            raise UserFunctionError(f"step {self.num_steps_done + 1} was broken off by a StopIteration") from error
        self._save_what_is_due()
        return metrics

    def _check_can_go_on(self) -> None:
        """Raises unless the trainer is open, holds its output folder, and is between two steps."""
        name, good = type(self).__name__, checkpoints.newest_checkpoint(self.output)
        if self.is_closed:
            raise UserError(f"{name} is closed: make it anew with resume=True to go on")
        self.folder.check()
        if self.is_in_step:
            advice = f"with resume=True to go on from {good}" if good else "with overwrite=True, there is no checkpoint"
            raise UserError(
                f"step {self.num_steps_done + 1} was broken off half-way, so the weights are neither those before it "
                f"nor those after it: make {name} anew {advice}"
            )

    def _do_step(self) -> dict[str, float]:
        """Does a step with its evaluation, and logs both."""
        if self.num_steps_done == 0 and self.evaluates_start and self.is_eval_due(0):
            self._record(self.held_out_metrics(0))
        self.is_in_step, number = self.updates_at_once, self.num_steps_done + 1
        try:
            metrics = self.step()
            if self.is_eval_due(number):
                metrics |= self.held_out_metrics(number)
            self.end_step(metrics)
        except (Exception, signals.Interrupted):
            self._keep_earlier_steps()
            raise
        self.num_steps_done = number
        self.is_in_step = False
        self._record(metrics)
        return metrics

    def _keep_earlier_steps(self) -> None:
        """If a step fails before it changes any weights, saves a checkpoint of the earlier steps, unless there is one.
        With several processes nothing is saved, since the others may not have failed."""
        is_kept = checkpoints.has_checkpoint(self.output, self.num_steps_done)
        if self.num_steps_done and not (self.is_in_step or is_kept or distributed.world_size() > 1):
            with suppress(OSError):  # the error that is under way matters more
                self.save_checkpoint()

    def _record(self, metrics: dict[str, float]) -> None:
        """Logs the metrics after num_steps_done steps, and writes the model if it is the best so far."""
        self.log.add(self.num_steps_done, metrics)
        if self.best.get("step") == self.num_steps_done:
            write_model(self.output, "best", self.num_steps_done, self.save)

    def _save_what_is_due(self) -> None:
        """Writes a checkpoint when one is due, and the model after the last step; stops when asked to."""
        every, is_last = self.config.save_every, self.num_steps_done == self.num_steps
        by_steps = (every and self.num_steps_done % every == 0) or (is_last and (every or self.config.save_minutes))
        # gathered, so that all processes do the same
        asked = distributed.all_gather((signals.pending(), self.clock.is_due(self.checkpoint_bytes)))
        stop = max(signal for signal, _ in asked)
        if stop or asked[0][1] or by_steps:
            self.save_checkpoint()
        if is_last:
            write_model(self.output, "model", self.num_steps_done, self.save)
            self.close()
            if self.plan is not None:
                self.log.say(self.plan.outcome())
        elif stop:
            distributed.all_gather(None)  # or torchrun would end the first process, which writes, when another is gone
            raise signals.Interrupted(stop)

    def _finish(self) -> None:
        """Writes the final model of a run that was done already, unless it is there, and closes."""
        if self.is_closed:
            return
        # it may be that of a run that has been extended since, and was killed before its model was replaced
        if distributed.all_gather(step_of(self.output / "model") != self.num_steps_done)[0]:
            write_model(self.output, "model", self.num_steps_done, self.save)
        self.close()

    def _forget_best(self) -> None:
        """Deletes best/, which is of a step that the run will do again."""
        self.best.clear()
        self.save_checkpoint()  # first, or a kill would bring back the score of what is deleted
        forget_model(self.output, "best")
        if distributed.is_main_process():
            remove(self.output / "best")

    def save_checkpoint(self) -> Path:
        """Writes a checkpoint of the steps done so far, from which resume=True goes on. Returns its folder.

        Raises: UserError after `close`, and after an exception in the middle of a step; MachineError when another run
        of the process has taken the output folder."""
        self._check_can_go_on()
        begun = time.monotonic()
        state = {"loop": self.state_dict(), "data_fingerprint": self.data_fingerprint}
        state["budget"], keep = self.budget.state_dict(), self.config.keep_checkpoints
        folder = checkpoints.save_checkpoint(self.output, self.num_steps_done, self.save_models, keep=keep, **state)
        self.clock.saved(time.monotonic() - begun)
        return folder

    def close(self) -> None:
        """Ends the run and lets go of its output folder. The models can still be used and saved."""
        self.is_closed = True
        signals.no_longer_defer_for(self)
        self.log.close()
        self.folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self) -> None:
        """Does all steps, and closes, whatever happens."""
        with self:
            list(self)
