"""How the responses of a PPO step become updates of the policy and of the value model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastrlhf.data import Demonstration, batch_rows, load_demonstrations, shuffled
from fastrlhf.data.order import MINIBATCHES, PTX, ROWS
from fastrlhf.errors import UserError
from fastrlhf.formulas.advantages import token_weights
from fastrlhf.models.offload import offload, onloaded
from fastrlhf.models.policy import ValueModel
from fastrlhf.ops import approx_kl, ppo_policy_loss, value_loss
from fastrlhf.packing import Packed, pack
from fastrlhf.runtime import distributed
from fastrlhf.runtime.checkpoint import bytes_of
from fastrlhf.runtime.fingerprints import fingerprint_tokens
from fastrlhf.runtime.metrics import Extreme, Statistics
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.trainers.loading import make_optimizer
from fastrlhf.trainers.ppo.models import PPOModels
from fastrlhf.trainers.token_budget import TokenBudget

EXTREMES: dict[str, Extreme] = {"logprob_change_max": "max", "ratio_max": "max", "ratio_min": "min"}  # of the policy


def load_ptx(config: PPOConfig, tokenizer: Any) -> list[Demonstration]:
    """Returns the demonstrations of PPO-ptx, none without ptx_data."""
    if config.ptx_data is None:
        return []
    options = config.prompt_options()
    max_tokens = options.pop("max_prompt_tokens") + config.max_new_tokens
    loaded = load_demonstrations(config.ptx_data, tokenizer, max_tokens=max_tokens, **options)
    distributed.print_once(loaded.report)
    return loaded.rows


@dataclass(frozen=True)
class Update:
    """What an optimizer step did.

    changed_policy: False while the value model warms up, and once the policy went too far (max_update_kl)"""

    stats: Statistics
    changed_policy: bool


class Learner:
    """The optimizers of a run, and the passes over each step's responses.

    ptx: demonstrations whose loss is added to the policy's
    budget: of a micro-batch"""

    def __init__(
        self, config: PPOConfig, models: PPOModels, budget: TokenBudget, *, ptx: Sequence[Demonstration]
    ) -> None:
        self.budget = budget
        self.config, self.ptx, self.num_value_warmup_steps = config, ptx, models.num_value_warmup_steps
        self.policy, self.value_model = models.policy, models.value_model
        self.step_index, self.kl_coef = 0, config.kl_coef
        self.orders = {"minibatches": MINIBATCHES, "ptx": PTX}  # what shuffles them is for
        updates = config.epochs * config.minibatches
        # the policy's schedule begins where its training does
        self.policy_optimizer = make_optimizer(
            config, self.policy, num_steps=updates * (config.steps - self.num_value_warmup_steps)
        )
        self.optimizers = [self.policy_optimizer]
        if self.value_model is not None:
            self.value_optimizer = make_optimizer(
                config,
                self.value_model,
                num_steps=updates * config.steps,
                learning_rate=config.value_learning_rate,
                schedule=config.value_schedule,
            )
            self.optimizers.append(self.value_optimizer)

    def offload_moments(self) -> None:
        """Lets the moments of the optimizers rest between updates."""
        for optimizer in self.optimizers:
            offload(optimizer, self.policy.model.device)

    def print_warmup(self, step: int) -> None:
        """Says before step 0, 1, ... how long the value model's warm-up lasts, if it does."""
        number = self.num_value_warmup_steps
        if step < number:
            steps = f"steps {step + 1} to {number} train" if step + 1 < number else f"step {number} trains"
            distributed.print_once(f"{steps} the value model alone; the policy is trained from step {number + 1} on")

    def train(self, batch: Packed, *, step: int, kl_coef: float, done: Callable[[int], object]) -> list[Update]:
        """Does the updates of step 0, 1, ...

        batch: fields logprobs, old_logprobs, ref_logprobs, advantages, prompts; with a value model values and returns
        done: called with the tokens of each micro-batch"""
        self.step_index, self.kl_coef = step, kl_coef
        if step == self.num_value_warmup_steps > 0:
            distributed.print_once(
                f"the value model's warm-up is over: from step {step + 1} on the policy is trained, too"
            )
        num_policy_steps = step - self.num_value_warmup_steps
        # wherever an earlier step ended
        self.policy_optimizer.num_steps_done = max(num_policy_steps, 0) * self.config.epochs * self.config.minibatches
        trains_policy, updates = num_policy_steps >= 0, []
        with onloaded(*self.optimizers):
            for number, minibatch in enumerate(self.minibatches(batch, step), 1):
                updates.append(self.update(minibatch, number, trains_policy, done))
                trains_policy = updates[-1].changed_policy
        return updates

    def minibatches(self, batch: Packed, step: int) -> Iterator[Packed]:
        """The minibatches of each epoch: the responses in an order that follows from seed, step and epoch.

        Those to one prompt stay together where the loss is a mean over them."""
        config = self.config
        each = config.samples_per_prompt if config.loss_mean == "prompt" else 1
        num_units = batch.num_sequences // each
        # as many minibatches as were asked for, whose sizes differ by one response, or prompt, at most
        bounds = [n * num_units // config.minibatches for n in range(config.minibatches + 1)]
        for epoch in range(config.epochs):
            order = shuffled(num_units, config.seed, step * config.epochs + epoch, purpose=self.orders["minibatches"])
            for start, stop in pairwise(bounds):
                yield batch.select([each * unit + n for unit in sorted(order[start:stop]) for n in range(each)])

    def update(self, minibatch: Packed, number: int, trains_policy: bool, done: Callable[[int], object]) -> Update:
        """One optimizer step of the policy and of the value model.

        Losses are sums over tokens divided by the tokens of the whole minibatch, so neither micro-batches matter nor
        the number of processes that share them."""
        work = partial(self.add_gradients, minibatch, trains_policy, done)
        stats = self.budget.run(
            work, lengths=minibatch.full_lengths, total=minibatch.num_tokens, optimizers=self.optimizers
        )
        where = f"step {self.step_index + 1}, minibatch {number} ({minibatch.num_sequences} responses)"
        changes_policy = trains_policy and not self.exceeds_max_kl(stats)
        if changes_policy:
            learning_rate = self.policy_optimizer.learning_rate
            stats.add("ppo/policy/", {"learning_rate": torch.tensor(learning_rate, dtype=torch.float64)})
            stats.add("ppo/policy/", {"grad_norm": self.policy_optimizer.step(f"the policy's update, {where}")})
        elif trains_policy:
            self.policy_optimizer.drop_gradients()
        if self.value_model is not None:
            stats.add("ppo/value/", {"grad_norm": self.value_optimizer.step(f"the value model's update, {where}")})
        return Update(stats, changes_policy)

    def add_gradients(
        self, minibatch: Packed, trains_policy: bool, done: Callable[[int], object], max_tokens: int
    ) -> Statistics:
        """Leaves the gradients of an update; returns its statistics. max_tokens: of a micro-batch."""
        num_tokens, stats = minibatch.num_response_tokens, Statistics()
        loss_mean, longest = self.config.loss_mean, self.config.max_new_tokens
        weights = token_weights(
            minibatch.cu_responses, minibatch["prompt_ids"], loss_mean=loss_mean, max_new_tokens=longest
        )
        minibatch = minibatch.with_fields(weights=weights, advantages=weights * minibatch["advantages"])
        self.policy.train()
        for part in minibatch.microbatches(max_tokens, share=distributed.rank_and_world_size()):
            if trains_policy:
                self.policy_loss(part, num_tokens, stats).backward()
            if self.value_model is not None:
                self.value_loss(self.value_model.train(), part, num_tokens, stats).backward()
            done(part.num_tokens_unshared)
        stats = stats.all_reduced()
        if self.ptx and trains_policy and not self.exceeds_max_kl(stats):
            self.add_ptx_gradients(stats, max_tokens)
        return stats

    def exceeds_max_kl(self, stats: Statistics) -> bool:
        """Whether the policy of an update is further from that of the step's start than it may be."""
        limit = self.config.max_update_kl
        return limit is not None and bool(stats.values["ppo/policy/approx_kl"] > limit)

    def policy_loss(self, part: Packed, num_tokens: int, stats: Statistics) -> Tensor:
        """A micro-batch's share of the policy's loss: clipped surrogate, entropy bonus and, if it is here, the KL."""
        config = self.config
        logprobs, entropy = self.policy(part, temperature=config.temperature, return_entropy=True)
        if not part.num_response_tokens:  # a filler: the pass is for the processes that have one more
            return logprobs.sum()
        loss, loss_stats = ppo_policy_loss(
            logprobs,
            part["old_logprobs"],
            part["advantages"],
            clip_range=(config.clip_range, config.clip_range_high or config.clip_range),
            dual_clip=config.dual_clip,
            denominator=num_tokens,
        )
        change = (logprobs - part["logprobs"]).abs()
        changes = {"logprob_change": change.sum() / num_tokens, "logprob_change_max": change.max()}
        means = {**changes, "loss": loss, "entropy": entropy.sum() / num_tokens, **loss_stats}
        stats.add("ppo/policy/", means, extremes=EXTREMES)
        if config.entropy_coef:
            loss = loss - config.entropy_coef * (part["weights"] * entropy).sum() / num_tokens
        if config.kl_in == "loss":
            kl = approx_kl(logprobs, part["ref_logprobs"], estimator=config.kl_estimator)
            kl = (part["weights"] * kl).sum() / num_tokens
            stats.add("ppo/policy/", {"kl_loss": kl})
            loss = loss + self.kl_coef * kl
        return loss

    def value_loss(self, model: ValueModel, part: Packed, num_tokens: int, stats: Statistics) -> Tensor:
        """A micro-batch's share of the value model's loss."""
        values = model(part)
        if not part.num_response_tokens:
            return values.sum()
        loss, loss_stats = value_loss(
            values, part["values"], part["returns"], clip_range=self.config.clip_range_value, denominator=num_tokens
        )
        stats.add("ppo/value/", {"loss": loss, **loss_stats})
        return self.config.value_coef * loss

    def add_ptx_gradients(self, stats: Statistics, max_tokens: int) -> None:
        """Adds the gradients of as many demonstrations to an update's (PPO-ptx: Ouyang et al., arXiv 2203.02155)."""
        config, number = self.config, self.policy_optimizer.num_steps_done
        num_rows = config.batch_size // config.minibatches  # alike each time: pieces of one stream
        drawn = batch_rows(len(self.ptx), num_rows, number, seed=config.seed, purpose=self.orders["ptx"])
        rows = [self.ptx[row] for row in drawn]
        batch = pack([row.tokens for row in rows], [row.response_mask for row in rows], device=self.policy.model.device)
        total = torch.zeros((), device=batch.tokens.device)
        for part in batch.microbatches(max_tokens, share=distributed.rank_and_world_size()):
            loss = -self.policy(part).sum() / batch.num_response_tokens
            (config.ptx_coef * loss).backward()
            total += loss.detach()
        stats.add("ppo/policy/", {"ptx_loss": distributed.all_reduce_sum(total)})

    def ptx_fingerprint(self) -> int:
        """A checksum of the demonstrations."""
        return fingerprint_tokens(row.tokens for row in self.ptx)

    def checkpoint_bytes(self) -> int:
        """About how many bytes a checkpoint takes: of the optimizers' models, a moved reference and an average."""
        copies = bool(self.config.reference_every) + (self.config.ema_decay is not None)
        trained = sum(bytes_of(optimizer.checkpoint_tensors()) for optimizer in self.optimizers)
        return trained + copies * bytes_of(self.policy_optimizer.parameters)

    def state_dict(self) -> dict[str, Any]:
        """The optimizers, what the orders are keyed by, and a checksum of the demonstrations."""
        state = {"policy_optimizer": self.policy_optimizer.state_dict(), "ptx": self.ptx_fingerprint()}
        state["orders"] = dict(self.orders)
        return state if self.value_model is None else {**state, "value_optimizer": self.value_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what state_dict gave; raises ValueError when the demonstrations are others."""
        if state["ptx"] != self.ptx_fingerprint():
            raise UserError(f"resume: the tokens of {self.config.ptx_data} are no longer those of the checkpoint")
        # a run of a version whose orders had one key goes on as it began
        self.orders = state.get("orders", dict.fromkeys(self.orders, ROWS))
        with onloaded(*self.optimizers):
            self.policy_optimizer.load_state_dict(state["policy_optimizer"])
            if self.value_model is not None:
                self.value_optimizer.load_state_dict(state["value_optimizer"])
