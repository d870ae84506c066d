"""PPO against a reward with a KL penalty to a reference model.

`PPO.step` is the algorithm, one verb a line; the rest of the file is what each verb means. Everything that a step draws
(prompts, sampling seeds, order of minibatches) follows from the seed and the step number, so a run that was killed
continues as if it had not been.

Source: Ziegler et al., arXiv 1909.08593; Stiennon et al., arXiv 2009.01325; Ouyang et al., arXiv 2203.02155.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrlhf.checkpoint import check_output
from fastrlhf.config import PPOConfig
from fastrlhf.data import Prompt, batch_rows, load_prompts, shuffled
from fastrlhf.first_step import check_first_step, have_same_weights
from fastrlhf.loop import advance, begin, check_fits, seed_everything
from fastrlhf.metrics import MetricsLog, Statistics
from fastrlhf.models import Policy, ValueModel, autocasting
from fastrlhf.ops import ppo_advantages, ppo_policy_loss, value_loss
from fastrlhf.optim import Optimizer
from fastrlhf.packing import Packed, pack
from fastrlhf.rewards import adapt_kl_coef, apply_missing_eos, parse_missing_eos
from fastrlhf.rollout import Engine, Sample, Sampling
from fastrlhf.scoring import Scorer
from fastrlhf.template import check_same_vocabulary, eos_token_ids, load_tokenizer


class PPO:
    """Iterates over PPO steps; each yields its metrics. The final policy is left in `<output>/model`.

    Raises: what loading raises, before any work is done; NonFiniteError when a gradient is not finite."""

    num_steps_done: int
    data_fingerprint: int
    log: MetricsLog

    def __init__(self, config: PPOConfig) -> None:
        parse_missing_eos(config.missing_eos)
        self.config = config
        self.num_steps = config.steps
        self.device = config.resolve_device()
        checkpoint = check_output(config)
        seed_everything(config.seed)
        self.tokenizer = load_tokenizer(config.model)
        options: dict[str, Any] = {name: getattr(config, name) for name in ("template", "limit", "max_rejected")}
        loaded = load_prompts(config.data, self.tokenizer, max_prompt_tokens=config.max_prompt_tokens, **options)
        self.prompts = loaded.rows
        options = {"max_tokens": config.max_tokens, "device": self.device, "autocast": config.autocast_dtype()}
        columns = {name for prompt in self.prompts for name in prompt.columns}
        self.scorer = Scorer(config.reward, self.tokenizer, columns=columns, **options)
        self.load_models(checkpoint)
        updates = config.epochs * config.minibatches
        # the policy's schedule begins where its training does
        num_policy_steps = config.steps - self.num_value_warmup_steps
        self.policy_optimizer = Optimizer.of(config, self.policy, num_steps=updates * num_policy_steps)
        self.value_optimizer = Optimizer.of(
            config, self.value_model, num_steps=updates * config.steps, learning_rate=config.value_learning_rate
        )
        self.kl_coef = config.kl_coef
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
        self.sampling = Sampling(**{name: getattr(config, name) for name in names})
        self.engine = Engine(
            self.policy.model,
            eos_token_ids=eos_token_ids(self.tokenizer, self.policy.model),
            max_slots=min(config.max_slots, config.batch_size),
        )
        longest = max(len(prompt.tokens) for prompt in self.prompts)
        reward_models = [model for model, _ in self.scorer.models]
        for model in (self.policy, self.reference, self.value_model, *reward_models):
            check_fits(model.model, self.tokenizer, longest_prompt=longest, max_new_tokens=config.max_new_tokens)
        begin(self, checkpoint, (prompt.tokens for prompt in self.prompts))
        self.log.say(str(loaded.report))

    def __iter__(self) -> Iterator[dict[str, float]]:
        return self

    def __next__(self) -> dict[str, float]:
        return advance(self)

    def load_models(self, checkpoint: Path | None) -> None:
        """The policy, its reference, and the value model: a copy of the reward model if there is just one, else the
        policy's body with a zero head, which then trains alone for the first steps."""
        config = self.config
        common: dict[str, Any] = {"autocast": config.autocast_dtype(), "device": self.device}
        trained = {**common, "gradient_checkpointing": config.gradient_checkpointing}
        self.policy = Policy.from_pretrained(checkpoint / "policy" if checkpoint else config.model, **trained)
        if config.reference:
            check_same_vocabulary(self.tokenizer, load_tokenizer(config.reference), f"reference {config.reference}")
        self.reference = Policy.from_pretrained(config.reference or config.model, freeze=True, **common)
        reward_models = self.scorer.models
        if checkpoint:
            self.value_model = ValueModel.from_pretrained(checkpoint / "value_model", **trained)
        elif len(reward_models) == 1:
            self.value_model = ValueModel.from_reward_model(
                reward_models[0][0],
                autocast=config.autocast_dtype(),
                gradient_checkpointing=config.gradient_checkpointing,
            )
        else:
            self.value_model = ValueModel.from_policy(self.policy, gradient_checkpointing=config.gradient_checkpointing)
        default = 0 if len(reward_models) == 1 else min(2, config.steps - 1)
        self.num_value_warmup_steps = default if config.value_warmup_steps is None else config.value_warmup_steps

    def step(self) -> dict[str, float]:
        """Runs one PPO step: sample, score, shape, estimate advantages, update. Returns its metrics."""
        config = self.config
        prompts = self.next_prompts()
        with self.log.timer("generate"):
            samples = self.generate(prompts)
        with self.log.timer("score"):
            batch, scores = self.score(prompts, samples)
        if self.num_steps_done == 0:
            self.check_first_step(batch, samples)
        finished = torch.tensor([sample.finished for sample in samples], device=self.device)
        _, advantages, returns, shaped = ppo_advantages(
            apply_missing_eos(scores, finished, config.missing_eos),
            batch["logprobs"],
            batch["ref_logprobs"],
            batch["values"],
            batch.cu_responses,
            kl_coef=self.kl_coef,
            gamma=config.gamma,
            lam=config.lam,
            whiten=config.whiten,
        )
        batch = batch.with_fields(advantages=advantages, returns=returns)
        with self.log.timer("update"), self.log.progress("update", config.epochs * batch.num_tokens) as done:
            stats = [self.update(minibatch, done, n) for n, minibatch in enumerate(self.minibatches(batch), 1)]
        metrics = self.describe(batch, scores, finished, shaped, stats)
        if config.kl_target is not None:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef, metrics["objective/kl"], target=config.kl_target, num_responses=len(samples)
            )
        return metrics

    def next_prompts(self) -> list[Prompt]:
        """The prompts of this step: each pass over the file has its own order, which follows from the seed."""
        rows = batch_rows(len(self.prompts), self.config.batch_size, self.num_steps_done, seed=self.config.seed)
        return [self.prompts[row] for row in rows]

    def generate(self, prompts: list[Prompt]) -> list[Sample]:
        """A response to each prompt. Its draws follow from its number in the run, not from the batch."""
        first = (self.config.seed << 32) + self.num_steps_done * self.config.batch_size
        total = len(prompts) * self.sampling.max_new_tokens
        with self.log.progress("generate", total) as done, autocasting(self.device, self.policy.autocast):
            return self.engine.generate(
                [prompt.tokens for prompt in prompts],
                self.sampling,
                seeds=range(first, first + len(prompts)),
                progress=done,
            )

    @torch.no_grad()
    def score(self, prompts: list[Prompt], samples: list[Sample]) -> tuple[Packed, Tensor]:
        """The pack of prompts and responses with logprobs, old_logprobs, ref_logprobs and values (R,), and the scores
        (N,). The KL is that of logprobs, the policy's own; ratios are to old_logprobs, the same but for truncation."""
        batch = pack(
            [sample.prompt + sample.response for sample in samples],
            prompt_lengths=[len(sample.prompt) for sample in samples],
            device=self.device,
        )
        if self.policy.autocast is None:
            # the engine's, which equal the trainer's to 1e-5
            logprobs = self.joined([sample.logprobs for sample in samples])
        else:
            # in half precision the two round differently, and the ratio of the first minibatch must be 1
            logprobs = self.logprobs(self.policy, batch)
        by_sampler = self.config.truncation == "sampler"
        batch = batch.with_fields(
            logprobs=logprobs,
            old_logprobs=self.joined([sample.sampler_logprobs for sample in samples]) if by_sampler else logprobs,
            ref_logprobs=self.logprobs(self.reference, batch),
            values=torch.cat([self.value_model(part) for part in batch.microbatches(self.config.max_tokens)]),
        )
        return batch, self.scorer(prompts, samples, batch)

    def joined(self, values: list[list[float]]) -> Tensor:
        """Values of each response's tokens, end to end: (R,) float32."""
        return torch.tensor([value for row in values for value in row], device=self.device)

    def logprobs(self, policy: Policy, batch: Packed) -> Tensor:
        """Log-probabilities (R,) of the sampled tokens, at the temperature of sampling."""
        parts = batch.microbatches(self.config.max_tokens)
        return torch.cat([policy(part, temperature=self.config.temperature) for part in parts])

    @torch.no_grad()
    def check_first_step(self, batch: Packed, samples: list[Sample]) -> None:
        """Stops unless, before the first update, ratios are 1 and, with equal weights, the KL to the reference is 0."""
        half = self.policy.autocast is not None
        text = check_first_step(
            self.joined([sample.logprobs for sample in samples]),
            batch["logprobs"] if half else self.logprobs(self.policy, batch),
            batch["ref_logprobs"],
            half=half,
            same_weights=have_same_weights(self.policy, self.reference),
        )
        if text:
            self.log.say(text)

    def minibatches(self, batch: Packed) -> Iterator[Packed]:
        """The minibatches of each epoch: the responses in an order that follows from seed, step and epoch."""
        config = self.config
        # as many minibatches as were asked for, whose sizes differ by one at most
        bounds = [n * batch.num_sequences // config.minibatches for n in range(config.minibatches + 1)]
        for epoch in range(config.epochs):
            order = shuffled(batch.num_sequences, config.seed, self.num_steps_done * config.epochs + epoch)
            for start, stop in pairwise(bounds):
                yield batch.select(sorted(order[start:stop]))

    def update(self, minibatch: Packed, done: Callable[[int], None], number: int) -> Statistics:
        """One optimizer step of the policy and of the value model. Returns its statistics.

        Losses are sums over tokens divided by the tokens of the whole minibatch, so micro-batches do not matter."""
        config, num_tokens = self.config, minibatch.num_responses
        trains_policy = self.num_steps_done >= self.num_value_warmup_steps
        stats = Statistics()
        self.policy.train()
        self.value_model.train()
        for part in minibatch.microbatches(config.max_tokens):
            if trains_policy:
                logprobs, entropy = self.policy(part, temperature=config.temperature, return_entropy=True)
                entropy = entropy.sum() / num_tokens
                loss, loss_stats = ppo_policy_loss(
                    logprobs,
                    part["old_logprobs"],
                    part["advantages"],
                    clip_range=config.clip_range,
                    denominator=num_tokens,
                )
                (loss - config.entropy_coef * entropy if config.entropy_coef else loss).backward()
                stats.add("ppo/policy/", {"loss": loss, "entropy": entropy, **loss_stats})
            loss, loss_stats = value_loss(
                self.value_model(part),
                part["values"],
                part["returns"],
                clip_range=config.clip_range_value,
                denominator=num_tokens,
            )
            (config.value_coef * loss).backward()
            stats.add("ppo/value/", {"loss": loss, **loss_stats})
            done(part.num_tokens)
        where = f"step {self.num_steps_done + 1}, minibatch {number} ({minibatch.num_sequences} responses)"
        if trains_policy:
            learning_rate = self.policy_optimizer.learning_rate
            stats.add("ppo/policy/", {"learning_rate": torch.tensor(learning_rate, dtype=torch.float64)})
            stats.add("ppo/policy/", {"grad_norm": self.policy_optimizer.step(f"the policy's update, {where}")})
        stats.add("ppo/value/", {"grad_norm": self.value_optimizer.step(f"the value model's update, {where}")})
        return stats

    def describe(
        self, batch: Packed, scores: Tensor, finished: Tensor, shaped: dict[str, Tensor], stats: list[Statistics]
    ) -> dict[str, float]:
        """The metrics of a step under the names the field knows. KL is summed over a response, then averaged."""
        metrics: dict[str, Any] = {
            "objective/scores": scores.mean(),
            "objective/scores_std": scores.std(correction=0),
            "objective/kl": shaped["kl"],
            "objective/kl_coef": self.kl_coef,
            "objective/rlhf_reward": shaped["rewards"],
            "objective/entropy": -batch["logprobs"].mean(),
            "response/length": batch.num_responses / batch.num_sequences,
            "response/eos_rate": finished.float().mean(),
            "ppo/value/mean": shaped["values"],
            "ppo/value/explained_variance": shaped["explained_variance"],
            "ppo/returns/mean": shaped["returns"],
            "num_tokens": batch.num_tokens,
        }
        metrics |= Statistics.mean(stats)
        return {name: float(value) for name, value in metrics.items()}

    def save_models(self, folder: Path) -> None:
        """Writes the models that a checkpoint needs."""
        self.policy.save_pretrained(folder / "policy")
        self.value_model.save_pretrained(folder / "value_model")

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "value_optimizer": self.value_optimizer.state_dict(),
            "kl_coef": self.kl_coef,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.value_optimizer.load_state_dict(state["value_optimizer"])
        self.kl_coef = state["kl_coef"]

    def save(self, folder: Path) -> None:
        """Writes the policy and its tokenizer as a folder that transformers loads."""
        self.policy.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
