"""Supervised fine-tuning: the cross-entropy of the response tokens of demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrlhf import ranks
from fastrlhf.budget import Budget
from fastrlhf.config import SFTConfig
from fastrlhf.data import Demonstration, batch_rows, load_demonstrations
from fastrlhf.loop import advance, begin, check_fits, ends_epoch, load_trained, load_with_held_out, prepare
from fastrlhf.memory_plan import plan_training, tell
from fastrlhf.metrics import MetricsLog
from fastrlhf.models import Policy
from fastrlhf.optim import Optimizer, check_finite
from fastrlhf.packing import Packed, pack
from fastrlhf.shards import shard
from fastrlhf.template import load_tokenizer


class SFT:
    """Fine-tunes a causal language model; iterate over it to train.

    for metrics in SFT(SFTConfig(model="HuggingFaceTB/SmolLM2-135M", data="demonstrations.jsonl", output="sft")):
        print(metrics["loss"])

    Raises: what the configuration, the data, the model or the output folder are refused for, before training begins."""

    num_steps_done: int
    data_fingerprint: int
    log: MetricsLog

    def __init__(self, config: SFTConfig) -> None:
        self.config = config
        checkpoint = prepare(config)
        self.device = config.resolve_device()
        self.tokenizer = load_tokenizer(config.model)
        self.demonstrations, self.held_out = load_with_held_out(load_demonstrations, config, self.tokenizer)
        self.num_rows = config.epochs * len(self.demonstrations)
        self.num_steps = -(-self.num_rows // config.batch_size)
        lengths = sorted((len(row.tokens) for row in self.demonstrations), reverse=True)
        self.plan = tell(plan_training, config, num_tokens=sum(lengths[: config.batch_size]))
        self.policy = load_trained(Policy, config, checkpoint)
        longest = max(len(row.tokens) for row in (*self.demonstrations, *self.held_out))
        check_fits(self.policy.model, self.tokenizer, longest_row=longest)
        if config.parallel == "fsdp":
            shard(self.policy)
        self.budget = Budget(config.max_tokens)
        self.optimizer = Optimizer.of(config, self.policy, num_steps=self.num_steps)
        begin(self, checkpoint, (demonstration.tokens for demonstration in self.demonstrations))

    def __iter__(self) -> Iterator[dict[str, float]]:
        return self

    def __next__(self) -> dict[str, float]:
        return advance(self)

    def step(self) -> dict[str, float]:
        """Does one optimizer step. Returns its metrics.

        loss = -sum of the response tokens' log-probabilities / their number in the whole step, so that neither packing
        nor micro-batches change it."""
        config, size = self.config, len(self.demonstrations)
        rows = batch_rows(size, config.batch_size, self.num_steps_done, seed=config.seed, total=self.num_rows)
        batch = self.pack([self.demonstrations[row] for row in rows])
        with self.log.progress(f"step {self.num_steps_done + 1}", batch.num_tokens) as done:
            work = partial(self.add_gradients, batch, done)
            loss = ranks.added(self.budget.run(work, lengths=batch.lengths, optimizers=[self.optimizer]))
        where = f"step {self.num_steps_done + 1}, rows {rows} of the rows used"
        check_finite("the loss", loss, where)
        metrics = {"loss": loss.item(), "learning_rate": self.optimizer.learning_rate}
        metrics["grad_norm"] = self.optimizer.step(where).item()
        metrics |= {"num_tokens": batch.num_tokens, "num_response_tokens": batch.num_responses}
        if self.held_out and ends_epoch(self.num_steps_done, config.batch_size, size, self.num_steps):
            metrics |= self.evaluate()
        return metrics

    def add_gradients(self, batch: Packed, done: Callable[[int], object], max_tokens: int) -> Tensor:
        """Leaves this process's share of the gradients of a step; returns that of the loss."""
        loss = torch.zeros((), device=self.device)
        for part in batch.microbatches(max_tokens, share=ranks.place()):
            part_loss = -self.policy(part).sum() / batch.num_responses
            part_loss.backward()
            loss += part_loss.detach()
            done(part.num_tokens)
        return loss

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss of the response tokens of the held-out demonstrations."""
        batch = self.pack(self.held_out)
        parts = batch.microbatches(self.config.max_tokens, share=ranks.place())
        total = ranks.added(torch.stack([self.policy(part).double().sum() for part in parts]).sum())
        return {"eval/loss": -total.item() / batch.num_responses}

    def pack(self, demonstrations: list[Demonstration]) -> Packed:
        """The pack of demonstrations."""
        tokens, masks = [d.tokens for d in demonstrations], [d.response_mask for d in demonstrations]
        return pack(tokens, masks, device=self.device)

    def save(self, folder: str | Path) -> None:
        """Writes model, generation settings and tokenizer as plain transformers loads them."""
        self.policy.save_pretrained(folder)
        if ranks.is_first():
            self.tokenizer.save_pretrained(folder)

    def save_models(self, folder: Path) -> None:
        """Writes what a checkpoint needs besides state_dict."""
        self.policy.save_trained(folder / "model")

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step besides the model."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what state_dict gave."""
        self.optimizer.load_state_dict(state["optimizer"])
