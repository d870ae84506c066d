"""PPO against a reward with a KL penalty to a reference model (Ziegler et al., arXiv 1909.08593; Ouyang et al., 2203.02155).

`PPO.step` is the algorithm, one verb a line; the rest of this file is what each verb means. Everything a step draws at
random (order of prompts, sampling seeds, order of minibatches) is a function of the seed and the step number, so a run
that was killed continues as if it had not been.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrlhf.config import PPOConfig
from fastrlhf.data import Prompt, eos_token_ids, load_prompts, load_tokenizer
from fastrlhf.models import Policy, RewardModel, ValueModel
from fastrlhf.ops import approx_kl, gae, masked_whiten, ppo_policy_loss, value_loss
from fastrlhf.packing import Packed, pack
from fastrlhf.rewards import adapt_kl_coef, apply_missing_eos, shape_rewards
from fastrlhf.rollout import Engine, Sample, Sampling
from fastrlhf.scoring import RewardFunction, Scorer


class PPO:
    def step(self) -> dict[str, float]:
        """Runs one PPO step: sample, score, shape, estimate advantages, update. Returns its metrics."""
        config = self.config
        prompts = self.next_prompts()
        with self.timer("generate"):
            samples = self.generate(prompts)
        with self.timer("score"):
            batch, scores = self.score(prompts, samples)
        if self.num_steps_done == 0:
            self.check_start(batch)
        finished = torch.tensor([sample.finished for sample in samples], device=scores.device)
        final_scores = apply_missing_eos(scores, finished, config.missing_eos)
        rewards = shape_rewards(
            final_scores, batch["old_logprobs"], batch["ref_logprobs"], batch.cu_responses, kl_coef=self.kl_coef
        )
        advantages, returns = gae(rewards, batch["values"], batch.cu_responses, gamma=config.gamma, lam=config.lam)
        if config.whiten:
            advantages = masked_whiten(advantages)
        batch = batch.with_fields(rewards=rewards, advantages=advantages, returns=returns)
        with self.timer("update"):
            stats = [self.update(minibatch) for minibatch in self.minibatches(batch)]
        metrics = self.describe(batch, scores, samples, stats)
        if config.kl_target is not None:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef, metrics["objective/kl"], target=config.kl_target, num_responses=len(samples)
            )
        return metrics

    def generate(self, prompts: list[Prompt]) -> list[Sample]:
        """One response to each prompt; the draws of a response depend on its number in the run, not on the batch."""
        first = self.num_steps_done * self.config.batch_size
        seeds = [(self.config.seed << 32) + first + i for i in range(len(prompts))]
        return self.engine.generate([prompt.tokens for prompt in prompts], self.sampling, seeds=seeds)

    @torch.no_grad()
    def score(self, prompts: list[Prompt], samples: list[Sample]) -> tuple[Packed, Tensor]:
        """The pack of prompts and responses with old_logprobs, ref_logprobs and values (R,), and the scores (N,)."""
        batch = pack(
            [sample.prompt + sample.response for sample in samples],
            prompt_lengths=[len(sample.prompt) for sample in samples],
            device=self.device,
        )
        parts = batch.microbatches(self.config.max_tokens)
        temperature = self.config.temperature
        batch = batch.with_fields(
            old_logprobs=self.old_logprobs(parts, samples),
            ref_logprobs=torch.cat([self.reference(part, temperature=temperature) for part in parts]),
            values=torch.cat([self.value_model(part) for part in parts]),
        )
        return batch, self.scorer(prompts, samples, batch)

    def update(self, minibatch: Packed) -> dict[str, Tensor]:
        """One optimizer step of the policy and of the value model. Returns its statistics.

        Losses are sums over tokens divided by the tokens of the whole minibatch, so micro-batches do not matter."""
        config, num_tokens = self.config, minibatch.num_responses
        stats: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for part in minibatch.microbatches(config.max_tokens):
            logprobs, entropy = self.policy(part, temperature=config.temperature, return_entropy=True)
            loss, policy_stats = ppo_policy_loss(
                logprobs,
                part["old_logprobs"],
                part["advantages"],
                clip_range=config.clip_range,
                denominator=num_tokens,
            )
            if self.trains_policy:
                bonus = config.entropy_coef * entropy.sum() / num_tokens if config.entropy_coef else 0.0
                (loss - bonus).backward()
            values = self.value_model(part)
            v_loss, value_stats = value_loss(
                values,
                part["values"],
                part["returns"],
                clip_range=config.clip_range_value,
                denominator=num_tokens,
            )
            (config.value_coef * v_loss).backward()
