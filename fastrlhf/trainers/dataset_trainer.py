"""What the loops on a file of rows share (sft.py, reward.py, dpo.py): their set-up and the books of a step.

Each of these says how a row is read and packed, what its loss is, and how held-out rows are evaluated.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastrlhf.data import Loaded, stream, verdict_of
from fastrlhf.errors import UserError
from fastrlhf.models.policy import PackedModel
from fastrlhf.runtime.checkpoint import bytes_of
from fastrlhf.runtime.fsdp import shard
from fastrlhf.runtime.metrics import Statistics
from fastrlhf.runtime.optim import check_finite
from fastrlhf.settings.objects import ModelSource, RowsSource
from fastrlhf.settings.training import DatasetTrainerConfig
from fastrlhf.trainers.base import Trainer
from fastrlhf.trainers.loading import check_fits, load_with_held_out, make_optimizer
from fastrlhf.trainers.memory_plan import plan_training, print_memory_plan

C = TypeVar("C", bound=DatasetTrainerConfig)
T = TypeVar("T")
M = TypeVar("M", bound=PackedModel)


class DatasetTrainer(Trainer, Generic[C, T, M]):
    """A trainer on the rows of a file. rows and held_out are those to train on and not.

    num_rows: to be trained on in all epochs; num_rows_done: so far"""

    config: C
    held_out: list[T]
    ended_epoch = False  # whether the last step did

    def set_up(self) -> None:
        self.load_data()
        self.load_model()
        self.make_optimizer()

    def load_data(self) -> None:
        """Reads the rows; plans the memory that their longest step takes."""
        config = self.config
        self.rows, self.held_out = load_with_held_out(self.read, config, self.tokenizer)
        self.num_rows = config.epochs * len(self.rows)
        self.num_rows_done, self.num_steps = 0, -(-self.num_rows // config.batch_size)
        self.longest_row = max(len(s) for row in (*self.rows, *self.held_out) for s in self.sequences(row))
        longest = sorted(map(self.num_tokens, self.rows), reverse=True)[: config.batch_size]
        plan = partial(plan_training, num_heads=self.num_heads, reference=self.transient_model())
        self.plan = print_memory_plan(plan, config, self.placement, num_tokens=sum(longest))

    def load_model(self) -> None:
        """Loads the model to train, and what its loss needs of the whole model."""
        self.final_model = self.model = self.make_model()
        check_fits(self.model.model, self.tokenizer, longest_row=self.longest_row)
        self.on_model_loaded()
        if self.config.parallel == "fsdp":
            shard(self.model)

    def make_optimizer(self) -> None:
        """Makes the optimizer, whose schedule ends with the last step."""
        self.optimizer = make_optimizer(self.config, self.model, num_steps=self.num_steps)

    @abstractmethod
    def read(self, path: RowsSource, tokenizer: Any, **options: Any) -> Loaded[T]:
        """The rows of a file."""

    @abstractmethod
    def sequences(self, row: T) -> Sequence[list[int]]:
        """The tokens of a row, each sequence from its start."""

    @property
    def num_heads(self) -> int:
        """How many heads of scores the model has; 0: it has one of words instead."""
        return 0

    def transient_model(self) -> ModelSource | None:
        """What is loaded beside the model, and gone before the first step."""
        return None

    @abstractmethod
    def make_model(self) -> M:
        """The model to train: that of the checkpoint, if there is one."""

    def on_model_loaded(self) -> None:
        """What there is to do with the whole model, before it is cut into shards."""

    def fingerprint_rows(self) -> Iterator[Sequence[int]]:
        """What a resumed run must read as the run before it did: the rows, tokens and all."""
        for row in (*self.rows, *self.held_out):
            yield from self.sequences(row)
            yield verdict_of(row).encode()

    @abstractmethod
    def add_gradients(self, rows: list[int], done: Callable[[int], object], max_tokens: int) -> Statistics:
        """Leaves this process's share of the gradients of a step on some of the rows, in micro-batches of max_tokens;
        returns its statistics, among them loss. done is told how many tokens were worked on."""

    def is_eval_due(self, step: int) -> bool:
        every = self.config.eval_every
        return bool(self.held_out) and step > 0 and (self.ended_epoch or bool(every and step % every == 0))

    def num_tokens(self, row: T) -> int:
        """The tokens of a row."""
        return sum(map(len, self.sequences(row)))

    def num_forward_tokens(self, row: T) -> int:
        """The tokens that the model is run on for a row."""
        return self.num_tokens(row)

    def step(self) -> dict[str, float]:
        """Does one optimizer step. Returns its metrics: of the rows of the step, before the update."""
        config, size = self.config, len(self.rows)
        done = min(self.num_rows_done + config.batch_size, self.num_rows)
        rows = stream(size, self.num_rows_done, done, seed=config.seed)
        lengths = [self.num_forward_tokens(self.rows[row]) for row in rows]
        with self.log.progress(f"step {self.num_steps_done + 1}", sum(lengths)) as count:
            work = partial(self.add_gradients, rows, count)
            stats = self.budget.run(work, lengths=lengths, optimizers=[self.optimizer])
        where = f"step {self.num_steps_done + 1}, rows {rows} of the rows used"
        values = stats.all_reduced().values
        check_finite("the loss", values["loss"], where)
        metrics = {name: value.item() for name, value in values.items()}
        metrics["learning_rate"] = self.optimizer.learning_rate
        metrics["grad_norm"] = self.optimizer.step(where).item()
        metrics["num_tokens"] = sum(self.num_tokens(self.rows[row]) for row in rows)
        self.ended_epoch = done == self.num_rows or done // size > self.num_rows_done // size
        self.num_rows_done = done
        return metrics

    def save_models(self, folder: Path) -> None:
        """Writes what a checkpoint needs besides state_dict."""
        self.model.save_trained(folder / "model")

    def checkpoint_bytes(self) -> int:
        """About how many bytes a checkpoint takes."""
        return bytes_of(self.optimizer.checkpoint_tensors())

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step besides the model."""
        return {"optimizer": self.optimizer.state_dict(), "num_rows_done": self.num_rows_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what state_dict gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        size = self.config.batch_size
        # the last step of a run that is extended may have been smaller
        self.num_rows_done = state.get("num_rows_done", min(self.num_steps_done * size, self.num_rows))
        if self.num_rows_done > self.num_rows:
            raise UserError(f"resume: epochs is {self.config.epochs}, but more than that is done already")
        self.num_steps = self.num_steps_done - (self.num_rows_done - self.num_rows) // size
        self.optimizer.set_num_steps(self.num_steps)
