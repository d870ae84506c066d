"""A policy from pairs of responses, of which one was preferred, without a reward model or sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrlhf.data import Loaded, Pair, load_pairs
from fastrlhf.errors import UserError
from fastrlhf.formulas.preferences import pair_losses
from fastrlhf.models.policy import Policy
from fastrlhf.models.shared_prompts import can_share_prompts
from fastrlhf.ops import linear_dpo_loss
from fastrlhf.packing import Packed
from fastrlhf.runtime import distributed
from fastrlhf.runtime.metrics import Statistics
from fastrlhf.settings.objects import RowsSource
from fastrlhf.settings.training import DPOConfig
from fastrlhf.stats.accuracy import is_right
from fastrlhf.trainers.objectives.pairwise import accuracy_of_pairs
from fastrlhf.trainers.packed_rows import full_sequences, microbatches_with_rows, pack_rows
from fastrlhf.trainers.preference import PreferenceTrainer


class DPO(PreferenceTrainer[DPOConfig, Pair]):
    """Trains a policy on preference pairs; iterate over it to train. What the reference makes of them is computed once.

        from fastrlhf import DPO, DPOConfig

        config = DPOConfig(model="MODEL", data="pairs.jsonl", output="runs/dpo")
        for metrics in DPO(config):
            print(metrics["loss"], metrics["accuracy"])

    model: the policy; rows, held_out: what it is trained on, and what not
    reference_logprobs: the reference's log-probabilities of the responses of both, end to end
    Source: Rafailov et al., arXiv 2305.18290; the other losses: preferences.py."""

    def read(self, path: RowsSource, tokenizer: Any, **options: Any) -> Loaded[Pair]:
        if self.config.loss == "kto":
            raise UserError("loss kto is of labelled responses: fastrlhf.KTO(config) trains on such")
        loaded = load_pairs(path, tokenizer, **options)
        if any((pair.margin, pair.head) != (0.0, None) for pair in loaded.rows):
            loaded.report.notes.append("columns not used (they are for reward models): margin, head")
        return loaded

    def sequences(self, row: Pair) -> list[list[int]]:
        return full_sequences(row)

    def needs_reference(self) -> bool:
        return not self.config.reference_free and self.config.loss not in ("simpo", "orpo")

    def on_model_loaded(self) -> None:
        self.shares_prompts = self.config.share_prompts and can_share_prompts(self.model, self.device)
        if self.needs_reference() and self.checkpoint is None:
            reference = self.load_reference()
            for name, pairs in (("pairs", self.rows), ("held_out", self.held_out)):
                self.reference_logprobs[name] = self.logprobs_of(reference, pairs)

    def num_forward_tokens(self, row: Pair) -> int:
        return self.num_tokens(row) - self.shares_prompts * len(row.prompt)

    def add_gradients(self, rows: list[int], done: Callable[[int], object], max_tokens: int) -> Statistics:
        batch, stats = self.pack("pairs", rows), Statistics()
        for part, pairs in microbatches_with_rows(batch, [self.rows[row] for row in rows], max_tokens):
            loss, part_stats = self.loss(part, pairs, len(rows))
            loss.backward()
            stats.add("", {"loss": loss, **part_stats})
            done(part.num_tokens)
        return stats

    def loss(self, part: Packed, pairs: Sequence[Pair], num_pairs: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's share of the loss of num_pairs pairs, and of their statistics: those of `linear_dpo_loss`."""
        config = self.config
        bounds = part.cu_responses if part.num_response_tokens else part.cu_responses[:1]  # a filler has no pairs
        plain = all(pair.weight == pair.preference == 1 for pair in pairs)
        if plain and config.loss == "sigmoid" and not config.length_normalized and not config.sft_coef:
            return self.model(
                part,
                op=linear_dpo_loss,
                cu_seqlens=bounds,
                ref_logprobs=reference_of(part),
                beta=config.beta,
                label_smoothing=config.label_smoothing,
                denominator=num_pairs,
            )
        losses, of_pairs = self.of_pairs(part, pairs)
        return losses.sum() / num_pairs, {name: values.sum() / num_pairs for name, values in of_pairs.items()}

    def of_pairs(self, part: Packed, pairs: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair of a micro-batch, weighted, and their statistics, all (N,) of N pairs."""
        config, num = self.config, 2 * len(pairs)
        lengths = part.response_lengths[:num]
        logprobs = self.model(part)
        sums, rewards = (
            torch.stack([x.sum() for x in values.split(lengths)]) if lengths else values
            for values in (logprobs, logprobs - reference_of(part))
        )
        divisors = torch.tensor(lengths, device=self.device).clamp(min=1)
        if config.length_normalized or config.loss in ("simpo", "orpo"):
            rewards = rewards / divisors
        loss_of = partial(
            pair_losses,
            loss=config.loss,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            target_margin=config.target_margin,
        )
        losses = loss_of(rewards[0::2], rewards[1::2]) - config.sft_coef * (sums / divisors)[0::2]
        weights, p = rewards.new_tensor([(pair.weight, pair.preference) for pair in pairs]).view(-1, 2).t()
        if any(pair.preference != 1 for pair in pairs):
            swapped = loss_of(rewards[1::2], rewards[0::2]) - config.sft_coef * (sums / divisors)[1::2]
            losses = p * losses + (1 - p) * swapped
        chosen, rejected = (config.beta * rewards[n::2].detach() for n in (0, 1))
        of_pairs = {
            "accuracy": torch.where(p == 0.5, 0.5, is_right(chosen - rejected, p)).to(chosen),
            "margin": chosen - rejected,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_logprobs": sums[0::2].detach(),
            "rejected_logprobs": sums[1::2].detach(),
        }
        return weights * losses, of_pairs

    @torch.no_grad()
    def held_out_metrics(self, step: int | None = None) -> dict[str, float]:
        """Means over the held-out pairs, and the accuracy as that of reward models, with its interval."""
        batch, parts = self.pack("held_out", range(len(self.held_out))), []
        for part, pairs in microbatches_with_rows(batch, self.held_out, self.config.max_tokens):
            losses, of_pairs = self.of_pairs(part, pairs)
            parts.append({"loss": losses, **of_pairs})
        found = {
            name: distributed.all_gather_cat(torch.cat([each[name] for each in parts])).double() for name in parts[0]
        }
        metrics = {name: values.mean().item() for name, values in found.items()}
        metrics |= accuracy_of_pairs(found["margin"], self.held_out)
        return {f"eval/{name}": value for name, value in metrics.items()}

    def pack(self, name: str, rows: Sequence[int]) -> Packed:
        """The pack of some of the pairs or held_out, with the field reference (R,) where there is one."""
        pairs = self.held_out if name == "held_out" else self.rows
        batch = self.pack_of([pairs[row] for row in rows])
        if not self.reference_logprobs:
            return batch
        # a first token that nothing predicts has no log-probability
        counts = [len(pair.chosen) + len(pair.rejected) - (0 if pair.prompt else 2) for pair in pairs]
        parts = self.reference_logprobs[name].split(counts)
        return batch.with_fields(reference=torch.cat([parts[row] for row in rows]).to(self.device))

    def pack_of(self, pairs: Sequence[Pair]) -> Packed:
        return pack_rows(pairs, share_prompts=self.shares_prompts, device=self.device)

    @torch.no_grad()
    def logprobs_of(self, policy: Policy, pairs: Sequence[Pair]) -> Tensor:
        """Log-probabilities (R,) of the responses, the chosen and the rejected one of each pair in turn."""
        if not pairs:
            return torch.empty(0)
        parts = self.pack_of(pairs).microbatches(
            self.config.max_tokens, together=2, share=distributed.rank_and_world_size()
        )
        return distributed.all_gather_cat(torch.cat([policy(part) for part in parts])).cpu()


def reference_of(part: Packed) -> Tensor:
    """The reference's log-probabilities (R,) of the response tokens, 0 without one."""
    return part.fields.get("reference", torch.zeros_like(part.targets, dtype=torch.float32))
