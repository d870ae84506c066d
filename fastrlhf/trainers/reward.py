"""A reward model from responses that were judged: pairs, rankings, labels or ratings (docs/reward.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrlhf.data import Judged, Loaded, layout_of, load_demonstrations
from fastrlhf.data.template import eos_token_ids
from fastrlhf.models.policy import RewardModel
from fastrlhf.models.shared_prompts import can_share_prompts
from fastrlhf.packing import Packed, pack
from fastrlhf.runtime import distributed
from fastrlhf.runtime.metrics import Statistics
from fastrlhf.settings.objects import RowsSource
from fastrlhf.settings.training import RewardConfig
from fastrlhf.trainers.dataset_trainer import DatasetTrainer
from fastrlhf.trainers.loading import check_fits, load_trained
from fastrlhf.trainers.objectives import LOADERS, Objective, Ratings, make_objective
from fastrlhf.trainers.packed_rows import full_sequences, microbatches_with_rows, pack_rows


class RewardTrainer(DatasetTrainer[RewardConfig, Judged, RewardModel]):
    """Trains a reward model; iterate over it to train.

        from fastrlhf import RewardConfig, RewardTrainer

        config = RewardConfig(model="MODEL", data="pairs.jsonl", output="runs/reward")
        for metrics in RewardTrainer(config):
            print(metrics["loss"], metrics["accuracy"])

    model: the reward model; rows, held_out: what it is trained on, and what not; objective: its loss"""

    def read(self, path: RowsSource, tokenizer: Any, **options: Any) -> Loaded[Any]:
        name = self.config.objective
        if name == "auto":
            name = LOADERS[layout_of(self.config.data)][1][0]
            self.config.check_objective(name)
        self.objective_name = name
        load = next(load for load, objectives in LOADERS.values() if name in objectives)
        return load(path, tokenizer, **options)

    def sequences(self, row: Judged) -> list[list[int]]:
        return full_sequences(row)

    @cached_property
    def objective(self) -> Objective[Any]:
        """What the rows are trained on."""
        return make_objective(self.objective_name, self.config, self.rows, self.held_out)

    @property
    def num_heads(self) -> int:
        return max(len(self.objective.heads), 1)

    def make_model(self) -> RewardModel:
        options = {"new_head": True, "heads": self.objective.heads, "head_init": self.config.head_init}
        model = load_trained(RewardModel, self.config, self.checkpoint, **options, **self.placement)
        if isinstance(self.objective, Ratings) and not any(model.biases):
            model.biases = self.objective.means.tolist()
        return model

    def on_model_loaded(self) -> None:
        set_pad_token(self.tokenizer, eos_token_ids(self.tokenizer, self.model.model))
        self.shares_prompts = self.config.share_prompts and can_share_prompts(self.model, self.device)
        self.center_on: list[list[int]] = []  # demonstrations that are to score 0
        if self.config.center_data is not None:
            loaded = load_demonstrations(
                self.config.center_data,
                self.tokenizer,
                max_tokens=self.config.max_length,
                template=self.config.template,
                template_kwargs=self.config.template_kwargs,
                max_rejected=self.config.max_rejected,
            )
            distributed.print_once(loaded.report)
            self.center_on = [row.answered for row in loaded.rows]
            check_fits(self.model.model, self.tokenizer, longest_row_of_center_data=max(map(len, self.center_on)))

    def fingerprint_rows(self) -> Iterator[Sequence[int]]:
        yield from super().fingerprint_rows()
        yield from self.center_on

    def num_forward_tokens(self, row: Judged) -> int:
        return self.num_tokens(row) - self.shares_prompts * len(row.prompt) * (len(row.responses) - 1)

    def end_step(self, metrics: dict[str, float]) -> None:
        compares = self.objective_name in ("pairs", "plackett_luce", "all_pairs")
        if compares and self.config.center_bias and self.num_steps_done + 1 == self.num_steps:
            metrics |= self.center()

    def add_gradients(self, rows: list[int], done: Callable[[int], object], max_tokens: int) -> Statistics:
        stats = Statistics()
        for part, its in self.microbatches([self.rows[row] for row in rows], max_tokens):
            loss, part_stats = self.objective.loss(self.scores_of(part, its), its, len(rows))
            loss.backward()
            stats.add("", {"loss": loss, **part_stats})
            done(part.num_tokens)
        return stats

    @torch.no_grad()
    def held_out_metrics(self, step: int | None = None) -> dict[str, float]:
        """Loss and accuracy (ratings: correlation) on the held-out rows, with the ends of the 95 % interval."""
        found = self.objective.evaluate(self.score(self.held_out).double(), self.held_out)
        return {f"eval/{name}": value for name, value in found.items()}

    @torch.no_grad()
    def center(self) -> dict[str, float]:
        """Sets the offsets with which the best responses of the training data (or the demonstrations of center_data)
        score 0 on average, each by its own head. Returns them."""
        names, offsets = self.objective.heads or (None,), self.model.biases
        if self.center_on:
            parts = pack(self.center_on, device=self.device).microbatches(
                self.config.max_tokens, share=distributed.rank_and_world_size()
            )
            num_own = len(pack(self.center_on, device=self.device).share_of(*distributed.rank_and_world_size()))
            scores = torch.cat([self.columns(self.model(part)) for part in parts])[:num_own]
            means = distributed.all_gather_cat(scores).double().mean(0).tolist()
        else:
            starts = accumulate((len(row.responses) for row in self.rows[:-1]), initial=0)
            places = [start + self.objective.best(row) for start, row in zip(starts, self.rows, strict=True)]
            best = self.score(self.rows)[torch.tensor(places)].double()
            own = [torch.tensor([name in self.objective.heads_of(row) for row in self.rows]) for name in names]
            means = [best[of_head, n].mean().item() for n, of_head in enumerate(own)]
        self.model.biases = [offset - mean for offset, mean in zip(offsets, means, strict=True)]
        return {"reward_bias" + (f"/{n}" if n else ""): x for n, x in zip(names, self.model.biases, strict=True)}

    def score(self, rows: Sequence[Judged]) -> Tensor:
        """The scores (M, H) of the responses of each row in turn, by each head."""
        parts = self.microbatches(rows, self.config.max_tokens)
        return distributed.all_gather_cat(torch.cat([self.scores_of(part, its) for part, its in parts]))

    def scores_of(self, part: Packed, rows: Sequence[Judged]) -> Tensor:
        """The scores (M, H) of a pack that begins with the responses of these rows; the others do not count."""
        return self.columns(self.model(part))[: sum(len(row.responses) for row in rows)]

    def columns(self, scores: Tensor) -> Tensor:
        """(M, H), also of one head."""
        return scores[:, None] if scores.ndim == 1 else scores

    def microbatches(self, rows: Sequence[Judged], max_tokens: int) -> Iterator[tuple[Packed, Sequence[Judged]]]:
        """This process's packs of the responses of each row in turn, each with the rows that it is of."""
        batch = pack_rows(rows, share_prompts=self.shares_prompts, as_responses=False, device=self.device)
        return microbatches_with_rows(batch, rows, max_tokens)

    def save(self, folder: str | Path) -> None:
        """Writes model and tokenizer as plain transformers loads them (AutoModelForSequenceClassification)."""
        self.model.model.config.pad_token_id = self.tokenizer.pad_token_id
        super().save(folder)


def set_pad_token(tokenizer: Any, ends: set[int]) -> None:
    """Gives the tokenizer a pad token that ends no response: another special token, or none where there is no other.

    Nothing here pads, but plain transformers reads a score at the last token that is no pad: with pad = eos it would
    read the one before the end, and without a pad it refuses batches, which is better than wrong scores."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        others = [i for i in tokenizer.all_special_ids if i not in ends]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(others[0]) if others else None
