"""Supervised fine-tuning: the cross-entropy of the response tokens of demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastrlhf.data import Demonstration, Loaded, load_demonstrations
from fastrlhf.models.policy import Policy
from fastrlhf.packing import Packed, pack
from fastrlhf.runtime import distributed
from fastrlhf.runtime.metrics import Statistics
from fastrlhf.settings.objects import RowsSource
from fastrlhf.settings.training import SFTConfig
from fastrlhf.trainers.dataset_trainer import DatasetTrainer
from fastrlhf.trainers.loading import load_trained


class SFT(DatasetTrainer[SFTConfig, Demonstration, Policy]):
    """Fine-tunes a causal language model; iterate over it to train.

        from fastrlhf import SFT, SFTConfig

        config = SFTConfig(model="MODEL", data="demonstrations.jsonl", output="runs/sft")
        for metrics in SFT(config):
            print(metrics["loss"])

    loss = -sum of the response tokens' log-probabilities / their number in the whole step, so that neither packing nor
    micro-batches change it.

    model: the policy; rows, held_out: what it is trained on, and what not"""

    def read(self, path: RowsSource, tokenizer: Any, **options: Any) -> Loaded[Demonstration]:
        return load_demonstrations(path, tokenizer, **options)

    def sequences(self, row: Demonstration) -> list[list[int]]:
        return [row.tokens]

    def make_model(self) -> Policy:
        return load_trained(Policy, self.config, self.checkpoint, **self.placement)

    def add_gradients(self, rows: list[int], done: Callable[[int], object], max_tokens: int) -> Statistics:
        batch, stats = self.pack([self.rows[row] for row in rows]), Statistics()
        for part in batch.microbatches(max_tokens, share=distributed.rank_and_world_size()):
            loss = -self.model(part).sum() / batch.num_response_tokens
            loss.backward()
            stats.add("", {"loss": loss, "num_response_tokens": torch.tensor(part.num_response_tokens)})
            done(part.num_tokens)
        return stats

    @torch.no_grad()
    def held_out_metrics(self, step: int | None = None) -> dict[str, float]:
        """The mean loss of the response tokens of the held-out demonstrations."""
        batch = self.pack(self.held_out)
        parts = batch.microbatches(self.config.max_tokens, share=distributed.rank_and_world_size())
        total = distributed.all_reduce_sum(torch.stack([self.model(part).double().sum() for part in parts]).sum())
        return {"eval/loss": -total.item() / batch.num_response_tokens}

    def pack(self, demonstrations: Sequence[Demonstration]) -> Packed:
        """The pack of demonstrations."""
        tokens, masks = [d.tokens for d in demonstrations], [d.response_mask for d in demonstrations]
        return pack(tokens, masks, device=self.device)
