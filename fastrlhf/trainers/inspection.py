"""What a trainer tells when it is asked: how good its model is now, and what the run has written so far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from fastrlhf.errors import UserError
from fastrlhf.models.policy import PackedModel
from fastrlhf.runtime.jsonl import read_jsonl


class Inspection(ABC):
    """Methods for any time between two steps, before the first and after `close` too; they leave the run as it is."""

    output: Path
    final_model: PackedModel  # what the run leaves, as it is now
    held_out: Any  # data; empty where there is none

    def evaluate(self) -> dict[str, float]:
        """Returns the metrics of the held-out data (eval_data or eval_fraction) as the model is now. All processes call
        it. The run takes no note of them: neither in metrics.jsonl nor in what is the best step.

            before = trainer.evaluate()
            trainer.run()
            print(before, trainer.evaluate())

        Raises: UserError where there is no held-out data."""
        if not self.held_out:
            raise UserError("evaluate: there is no held-out data: set eval_data, or eval_fraction where there is that")
        return self.held_out_metrics()

    @abstractmethod
    def held_out_metrics(self, step: int | None = None) -> dict[str, float]:
        """Returns the metrics of the held-out data. step: of the run, which notes them; None: nothing does"""

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl so far: `step` and the metrics after it; None for what was not finite.

        for row in trainer.read_metrics():
            print(row["step"], row["num_tokens"])"""
        return self._rows("metrics.jsonl")

    def _rows(self, name: str) -> list[dict[str, Any]]:
        return read_jsonl(self.output / name) if (self.output / name).exists() else []


class SampleInspection(Inspection):
    """The same of a trainer that draws responses."""

    def read_samples(self, step: int | None = None) -> list[dict[str, Any]]:
        """Returns the rows of samples.jsonl so far, of all steps or of one: prompt, response, finished, score,
        kl and the step. A few of every samples_every-th step are there.

        for row in ppo.read_samples(step=1):
            print(row["score"], row["response"])"""
        return [row for row in self._rows("samples.jsonl") if step in (None, row["step"])]
