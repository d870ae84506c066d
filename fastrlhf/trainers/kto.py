"""A policy from responses that were labelled as wanted or not, without pairs: KTO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrlhf.data import Labelled, Loaded, load_labelled
from fastrlhf.errors import UserError
from fastrlhf.formulas.preferences import labelled_losses
from fastrlhf.models.policy import Policy
from fastrlhf.packing import Packed
from fastrlhf.runtime import distributed
from fastrlhf.runtime.metrics import Statistics
from fastrlhf.settings.objects import RowsSource
from fastrlhf.settings.training import DPOConfig, KTOConfig
from fastrlhf.trainers.dpo import DPO
from fastrlhf.trainers.objectives.base import accuracy_of
from fastrlhf.trainers.packed_rows import full_sequences, pack_rows
from fastrlhf.trainers.preference import PreferenceTrainer


class KTO(PreferenceTrainer[KTOConfig | DPOConfig, Labelled]):
    """Trains a policy on labelled responses; iterate over it to train.

        from fastrlhf import KTO, KTOConfig

        config = KTOConfig(model="MODEL", data="labelled.jsonl", output="runs/kto")
        for metrics in KTO(config):
            print(metrics["loss"], metrics["kl"])

    model: the policy; rows, held_out: what it is trained on, and what not

    A response counts by how far its log-probability, less the reference's, is from kl: the mean of that over the
    rows of the step, each prompt with a response to another prompt, or 0 if it is negative. It gets no gradient.
    Source: Ethayarajh et al., arXiv 2402.01306, equation 8; kl as in TRL's KTOTrainer, but of the whole step."""

    def read(self, path: RowsSource, tokenizer: Any, **options: Any) -> Loaded[Labelled]:
        if isinstance(self.config, DPOConfig) and self.config.loss != "kto":
            raise UserError(f"loss {self.config.loss} is of pairs: fastrlhf.DPO(config) trains on such")
        loaded = load_labelled(path, tokenizer, **options)
        if any(row.head is not None for row in loaded.rows):
            loaded.report.notes.append("column not used (it is for reward models): head")
        return loaded

    def sequences(self, row: Labelled) -> list[list[int]]:
        return full_sequences(row)

    def on_model_loaded(self) -> None:
        self.mismatched = {
            name: mismatched(rows, self.longest_row, what)
            for name, rows, what in (("rows", self.rows, "rows used"), ("held_out", self.held_out, "held-out rows"))
        }
        if self.checkpoint is not None:
            return
        reference = self.load_reference()
        for name, rows in (("rows", self.rows), ("held_out", self.held_out)):
            for key, given in ((name, rows), (f"{name}, mismatched", self.mismatched[name])):
                self.reference_logprobs[key] = self.response_logprobs(reference, given)

    def add_gradients(self, rows: list[int], done: Callable[[int], object], max_tokens: int) -> Statistics:
        stats, kl = Statistics(), self.kl("rows", rows, max_tokens)
        for part, numbers in self.microbatches("rows", rows, max_tokens):
            losses, of_rows = self.losses("rows", part, numbers, kl)
            loss = losses.sum() / len(rows)
            loss.backward()
            means = {name: values.detach().sum() / len(rows) for name, values in of_rows.items()}
            stats.add("", {"loss": loss, **means})
            done(part.num_tokens)
        if distributed.is_main_process():  # the same in all processes, whose statistics are added
            stats.add("", {"kl": kl})
        return stats

    @torch.no_grad()
    def kl(self, name: str, rows: Sequence[int], max_tokens: int) -> Tensor:
        """The mean over rows of how much likelier than the reference the policy makes a mismatched response; 0 where
        it is negative."""
        given = [self.mismatched[name][row] for row in rows]
        reference = self.reference_logprobs[f"{name}, mismatched"][list(rows)]
        found = self.response_logprobs(self.model, given, max_tokens).double() - reference
        return found.mean().clamp(min=0).float().to(self.device)

    def losses(self, name: str, part: Packed, rows: Sequence[int], kl: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each of some rows, with which a pack begins, and their statistics."""
        given = [(self.held_out if name == "held_out" else self.rows)[row] for row in rows]
        sums = response_sums(self.model(part), part)[: len(rows)]
        ratios = sums - self.reference_logprobs[name][list(rows)].to(sums)
        labels, weights = sums.new_tensor([(row.label, row.weight) for row in given]).view(-1, 2).t()
        losses = weights * labelled_losses(
            ratios,
            labels,
            kl,
            beta=self.config.beta,
            desirable_weight=self.config.desirable_weight,
            undesirable_weight=self.config.undesirable_weight,
        )
        reward = self.config.beta * ratios
        stats = {"wanted": reward * (labels > 0.5), "unwanted": reward * (labels < 0.5), "logprobs": sums}
        ahead = (ratios - kl) * (labels - 0.5)
        return losses, {"accuracy": 0.5 + 0.5 * ahead.sign(), **stats}

    @torch.no_grad()
    def held_out_metrics(self, step: int | None = None) -> dict[str, float]:
        """Means over the held-out rows; accuracy: a wanted response is above kl, another below, of labels but 1/2."""
        size, max_tokens = len(self.held_out), self.config.max_tokens
        numbers = range(size)
        kl = self.kl("held_out", numbers, max_tokens)
        parts = [
            self.losses("held_out", part, its, kl) for part, its in self.microbatches("held_out", numbers, max_tokens)
        ]
        losses = distributed.all_gather_cat(torch.cat([losses for losses, _ in parts]))
        names = ("accuracy", "wanted", "unwanted", "logprobs")
        found = {
            name: distributed.all_gather_cat(torch.cat([stats[name] for _, stats in parts])).double() for name in names
        }
        metrics = {"loss": losses.double().mean().item(), **{name: x.mean().item() for name, x in found.items()}}
        decided = [n for n in numbers if self.held_out[n].label != 0.5]
        metrics |= accuracy_of(found["accuracy"][decided], [self.held_out[n] for n in decided])
        metrics |= {"kl": kl.item(), "num_labels": len(decided)}
        return {f"eval/{name}": value for name, value in metrics.items()}

    def microbatches(self, name: str, rows: Sequence[int], max_tokens: int) -> list[tuple[Packed, Sequence[int]]]:
        """This process's packs, each with the numbers of the rows that it is of; a filler is of none."""
        given = self.held_out if name == "held_out" else self.rows
        return [(part, rows[start:stop]) for part, start, stop in self.cut([given[row] for row in rows], max_tokens)]

    def cut(self, rows: Sequence[Labelled], max_tokens: int) -> list[tuple[Packed, int, int]]:
        """This process's packs of rows, each with the bounds of those that it is of."""
        batch = pack_rows(rows, share_prompts=False, device=self.device)
        own, parts = batch.share_of(*distributed.rank_and_world_size()), []
        start = own.start
        for part in batch.microbatches(max_tokens, share=distributed.rank_and_world_size()):
            stop = min(start + part.num_sequences, own.stop)
            parts.append((part, start, stop))
            start = stop
        return parts

    @torch.no_grad()
    def response_logprobs(self, policy: Policy, rows: Sequence[Labelled], max_tokens: int | None = None) -> Tensor:
        """Log-probabilities (N,) of whole responses."""
        if not rows:
            return torch.empty(0)
        parts = self.cut(rows, max_tokens or self.config.max_tokens)
        sums = [response_sums(policy(part), part)[: stop - start] for part, start, stop in parts]
        return distributed.all_gather_cat(torch.cat(sums)).cpu()


def response_sums(logprobs: Tensor, part: Packed) -> Tensor:
    """(N,) the sums over the response tokens of each sequence, from (R,) of the tokens."""
    return torch.stack([x.sum() for x in logprobs.split(part.response_lengths)])


def mismatched(rows: Sequence[Labelled], longest: int, what: str = "rows used") -> list[Labelled]:
    """Each prompt with the response of the nearest row before it (the last one before the first) that has another
    prompt, where both are at most `longest` tokens, as the longest row is.

    Raises: ValueError for a prompt without such a response."""
    found = []
    for n, row in enumerate(rows):
        others = (rows[n - k] for k in range(1, len(rows)))
        room = longest - len(row.prompt)
        other = next((x for x in others if x.prompt != row.prompt and len(x.response) <= room), None)
        if other is None:
            raise UserError(
                f"kto: no response to another prompt makes with the prompt of row {n + 1} of the {what} at most "
                f"{longest} tokens, as the longest row has; the KL divergence is estimated from such"
            )
        found.append(Labelled(row.prompt, other.response, row.label))
    return found


def preference_trainer(config: DPOConfig) -> DPO | KTO:
    """The loop of `fastrlhf dpo`."""
    return KTO(config) if config.loss == "kto" else DPO(config)
