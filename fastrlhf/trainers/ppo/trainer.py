"""PPO against a reward with a KL penalty to a reference model.

`PPO.step` is the algorithm, one verb a line; the rest of the file is what each verb means. Everything that a step draws
(prompts, sampling seeds, order of minibatches) follows from the seed and the step number, so a run that was killed
continues as if it had not been.

Source: Ziegler et al., arXiv 1909.08593; Stiennon et al., arXiv 2009.01325; Ouyang et al., arXiv 2203.02155.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrlhf.data import Prompt, batch_rows, load_prompts
from fastrlhf.data.template import check_reads_ids_of
from fastrlhf.formulas.advantages import per_token
from fastrlhf.generation.sampling import RolloutBackend, Sample
from fastrlhf.models.offload import check_offload, onloaded
from fastrlhf.models.policy import Policy
from fastrlhf.models.shared_prompts import can_share_prompts, pack_responses
from fastrlhf.packing import Packed
from fastrlhf.rewards.shaping import RunningMoments
from fastrlhf.rewards.sources import check_reward
from fastrlhf.runtime import distributed
from fastrlhf.settings.ppo import STALE, PPOConfig
from fastrlhf.trainers.base import Trainer
from fastrlhf.trainers.inspection import SampleInspection
from fastrlhf.trainers.memory_plan import plan_ppo, print_memory_plan
from fastrlhf.trainers.ppo.advantages import next_kl_coef, shaped_scores, with_advantages
from fastrlhf.trainers.ppo.diagnostics import HealthChecks, describe, mean_kl, sample_rows
from fastrlhf.trainers.ppo.held_out import HeldOut, load_eval_prompts, load_scorers
from fastrlhf.trainers.ppo.learner import Learner, Update, load_ptx
from fastrlhf.trainers.ppo.models import PPOModels, check_lengths, load_base
from fastrlhf.trainers.ppo.rollout import Rollout
from fastrlhf.trainers.ppo.sanity_checks import check_first_step


class PPO(SampleInspection, Trainer):
    """Trains a policy with PPO, or an estimator beside it; iterate over it to train.

        from fastrlhf import PPO, PPOConfig

        config = PPOConfig(model="MODEL", reward="REWARD", data="prompts.jsonl", output="runs/ppo")
        for metrics in PPO(config):
            print(metrics["objective/scores"], metrics["objective/kl"])

    policy, reference, value_model: the models (`models` has them all); scorer: what scores responses
    rollout: draws the responses; learner: updates the policy and the value model
    backend: makes of the policy a `RolloutBackend`, which draws the responses in place of what the settings ask for"""

    config: PPOConfig
    held_out: HeldOut
    updates_at_once = False

    def __init__(self, config: PPOConfig, *, backend: Callable[[Policy], RolloutBackend] | None = None) -> None:
        check_reward(config.reward, config.eval_reward)
        self.backend = backend
        super().__init__(config)

    def set_up(self) -> None:
        self.load_data()
        self.load_models()
        self.make_learner()
        self.make_rollout()

    def load_data(self) -> None:
        """Reads the prompts, the held-out prompts and the demonstrations of PPO-ptx; plans the memory of a step."""
        config, self.num_steps = self.config, self.config.steps
        distributed.check_batch_divisible(config.batch_size, config.samples_per_prompt)
        check_offload(config.offload, self.device)
        loaded = load_prompts(config.data, self.tokenizer, limit=config.limit, **config.prompt_options())
        self.prompts, self.report = loaded.rows, loaded.report
        longest = max(len(row.tokens) for row in self.prompts)
        self.plan = print_memory_plan(plan_ppo, config, self.placement, longest_prompt=longest)
        self.eval_prompts = load_eval_prompts(config, self.tokenizer, self.prompts)
        self.ptx = load_ptx(config, self.tokenizer)

    def load_models(self) -> None:
        """Loads what scores responses, then the policy, its reference and its value model."""
        config = self.config
        base = load_base(config, **self.placement)
        rows = self.prompts, self.eval_prompts
        self.scorer, eval_scorer = load_scorers(config, self.tokenizer, *rows, base=base, **self.placement)
        self.held_out = HeldOut(config, self.eval_prompts, trained=self.scorer, scorer=eval_scorer)
        self.best = self.held_out.best
        if config.reference:
            check_reads_ids_of(self.tokenizer, config.reference, "reference")
        reward_models = [model for model, _ in self.scorer.models]
        scoring = [*reward_models, *(model for model, _ in eval_scorer.models)]
        self.models = PPOModels(config, reward_models, self.checkpoint, base, **self.placement)
        self.policy, self.reference = self.models.policy, self.models.reference
        self.value_model, self.final_model = self.models.value_model, self.models.final
        everything = [self.policy, self.reference, *scoring, *filter(None, [self.value_model])]
        check_lengths(config, self.tokenizer, everything, [*self.prompts, *self.eval_prompts], self.ptx)
        shares = config.share_prompts and config.samples_per_prompt > 1
        self.shares_prompts = shares and all(can_share_prompts(model, self.device) for model in everything)
        if config.parallel == "fsdp":
            self.models.shard(*{*scoring})
        if config.offload == "idle":
            self.models.offload_idle(*scoring)

    def make_learner(self) -> None:
        """Makes what updates the models, and what else changes from step to step."""
        config = self.config
        self.learner = Learner(config, self.models, self.budget, ptx=self.ptx)
        if config.offload == "idle":
            self.learner.offload_moments()
        self.kl_coef, self.score_moments = config.kl_coef, RunningMoments()
        synced = config.rollout_url is not None and config.weight_sync != STALE
        self.health = HealthChecks(ratios_start_at_one=config.truncation != "sampler", weights_are_synced=synced)

    def make_rollout(self) -> None:
        """Makes what draws responses."""
        self.rollout = Rollout(self.config, self.models, self.tokenizer, backend=self.backend)
        self.rollout.check([*self.prompts, *self.eval_prompts])

    def restore(self) -> None:
        super().restore()
        self.log.say(str(self.report))
        self.learner.print_warmup(self.num_steps_done)

    def fingerprint_rows(self) -> Iterator[Sequence[int]]:
        return (prompt.tokens for prompt in self.prompts)

    def step(self) -> dict[str, float]:
        """Runs one PPO step: sample, score, shape, estimate advantages, update. Returns its metrics."""
        config = self.config
        prompts = self.next_prompts()
        with self.log.timer("generate"):
            samples = self.generate(prompts)
        with self.log.timer("score"):
            batch, scores, terms = self.score(prompts, samples)
        if self.num_steps_done == 0:
            self.check_first_step(batch, samples)
        self.is_in_step = True  # an error before this line leaves a checkpoint of the steps before
        self.score_moments.add(scores)
        batch, advantage_stats = with_advantages(
            config,
            batch,
            self.shaped_scores(samples, batch, scores),
            kl_coef=self.kl_coef,
            baseline=self.greedy_scores(prompts) if config.estimator == "remax" else None,
        )
        with self.log.timer("update"), self.log.progress("update", config.epochs * batch.num_tokens_unshared) as done:
            updates = self.learner.train(batch, step=self.num_steps_done, kl_coef=self.kl_coef, done=done)
            self.log.timer.count(config.epochs * batch.num_tokens_unshared)
        metrics = self.describe(batch, samples, scores, terms, advantage_stats, updates)
        self.kl_coef = next_kl_coef(config, self.kl_coef, mean_kl(batch).item(), self.num_steps_done + 1)
        self.models.end_step(self.num_steps_done + 1)
        return metrics

    def next_prompts(self) -> list[Prompt]:
        """The prompts of this step, each as often as it is answered, one after the other.

        Each pass over the file has its own order, which follows from the seed."""
        each = self.config.samples_per_prompt
        rows = batch_rows(len(self.prompts), self.config.batch_size // each, self.num_steps_done, seed=self.config.seed)
        return [self.prompts[row] for row in rows for _ in range(each)]

    def generate(self, prompts: list[Prompt], *, greedy: bool = False, held_out: bool = False) -> list[Sample]:
        """A response to each prompt, of the final policy to held-out ones. Its draws follow from its number in the run,
        not from the batch or the process."""
        first = (self.config.seed << 32) + self.num_steps_done * self.config.batch_size
        seeds = self.held_out.seeds if held_out else range(first, first + len(prompts))
        samples = self.rollout.generate(prompts, seeds, greedy=greedy, final=held_out)
        self.log.timer.count(sum(len(sample.response) for sample in samples))
        return samples

    @torch.no_grad()
    def score(self, prompts: list[Prompt], samples: list[Sample]) -> tuple[Packed, Tensor, list[Tensor]]:
        """The pack of prompts and responses with logprobs, old_logprobs, ref_logprobs and values (R,), the scores
        (N,), and those of each term. The KL is that of logprobs, the policy's own; ratios are to old_logprobs, the same
        but for truncation."""
        batch = self.pack(samples)
        sampled = self.per_response_token([sample.logprobs for sample in samples])
        logprobs = sampled if self.rollout.gives_logprobs else self.logprobs(self.policy, batch)
        by_sampler = self.config.truncation == "sampler"
        number = torch.arange(batch.num_sequences, device=self.device) // self.config.samples_per_prompt
        batch = batch.with_fields(
            logprobs=logprobs,
            rollout_logprobs=sampled,
            old_logprobs=self.per_response_token([sample.sampler_logprobs for sample in samples])
            if by_sampler
            else logprobs,
            ref_logprobs=self.logprobs(self.reference, batch),
            prompt_ids=per_token(number, batch.cu_responses, batch.num_response_tokens),
        )
        if self.value_model is not None:
            batch = batch.with_fields(values=self.compute_in_microbatches(batch, self.value_model))
        terms = self.scorer.terms(prompts, samples, batch)
        self.log.timer.count(batch.num_tokens_unshared)
        return batch, self.scorer.total(terms), terms

    @torch.no_grad()
    def greedy_scores(self, prompts: list[Prompt]) -> Tensor:
        """The shaped score (N,) of the greedy response to each prompt."""
        each = self.config.samples_per_prompt
        asked = prompts[::each]
        with self.log.timer("generate"):
            samples = self.generate(asked, greedy=True)
        with self.log.timer("score"):
            batch = self.pack(samples)
            scores = self.scorer(asked, samples, batch)
            self.log.timer.count(batch.num_tokens_unshared)
        return self.shaped_scores(samples, batch, scores).repeat_interleave(each)

    def shaped_scores(self, samples: list[Sample], batch: Packed, scores: Tensor) -> Tensor:
        """The shaped scores (N,) of the responses."""
        finished = torch.tensor([sample.finished for sample in samples], device=self.device)
        return shaped_scores(self.config, scores, batch.cu_responses.diff(), finished, self.score_moments)

    def pack(self, samples: list[Sample]) -> Packed:
        """The pack of prompts and responses; a prompt is in it once for neighbours that answer it."""
        prompts, responses = ([getattr(s, part) for s in samples] for part in ("prompt", "response"))
        return pack_responses(prompts, responses, share_prompts=self.shares_prompts, device=self.device)

    def per_response_token(self, values: list[list[float]]) -> Tensor:
        """Values of each response's tokens, end to end: (R,) float32."""
        return torch.tensor([value for row in values for value in row], device=self.device)

    def logprobs(self, policy: Policy, batch: Packed) -> Tensor:
        """Log-probabilities (R,) of the sampled tokens, at the temperature of sampling."""
        with onloaded(policy):
            return self.compute_in_microbatches(batch, lambda part: policy(part, temperature=self.config.temperature))

    def compute_in_microbatches(self, batch: Packed, compute: Callable[[Packed], Tensor]) -> Tensor:
        """What compute says of the response tokens (R,); each process computes it for a share of them."""
        parts = batch.microbatches(self.config.max_tokens, share=distributed.rank_and_world_size())
        return distributed.all_gather_cat(torch.cat([compute(part) for part in parts]))

    @torch.no_grad()
    def check_first_step(self, batch: Packed, samples: list[Sample]) -> None:
        """Stops unless, before the first update, ratios are 1 and, with equal weights, the KL to the reference is 0."""
        text = check_first_step(
            self.policy,
            self.reference,
            self.per_response_token([sample.logprobs for sample in samples]),
            self.logprobs(self.policy, batch) if self.rollout.gives_logprobs else batch["logprobs"],
            batch["ref_logprobs"],
            half=not self.rollout.gives_logprobs,
        )
        if text:
            self.log.say(text)

    def describe(
        self,
        batch: Packed,
        samples: list[Sample],
        scores: Tensor,
        terms: list[Tensor],
        advantage_stats: dict[str, Tensor],
        updates: list[Update],
    ) -> dict[str, float]:
        """The metrics of a step; leaves some responses in samples.jsonl when that is due."""
        named = dict(zip(self.scorer.names, terms, strict=True))
        described = describe(batch, samples, scores, named, advantage_stats, [update.stats for update in updates])
        metrics = {"objective/kl_coef": self.kl_coef, **{name: float(value) for name, value in described.items()}}
        every = self.config.samples_every
        if every and self.num_steps_done % every == 0:
            self.log.samples(self.num_steps_done + 1, sample_rows(samples, batch, scores, self.tokenizer))
        return metrics

    def end_step(self, metrics: dict[str, float]) -> None:
        for warning in self.health.check(metrics):
            self.log.say(warning)

    def is_eval_due(self, step: int) -> bool:
        return self.held_out.is_due(step)

    def held_out_metrics(self, step: int | None = None) -> dict[str, float]:
        """The metrics of the final policy's responses to the held-out prompts; with a step, takes note of the best."""
        held_out = self.held_out.apart() if step is None else self.held_out
        with self.log.timer("evaluate"):
            samples = self.generate(self.eval_prompts, greedy=self.config.eval_greedy, held_out=True)
            return held_out.judge(self.num_steps_done if step is None else step, samples, self.pack(samples))

    def save_models(self, folder: Path) -> None:
        self.models.save(folder)

    def checkpoint_bytes(self) -> int:
        return self.learner.checkpoint_bytes()

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step besides the models."""
        own = {"kl_coef": self.kl_coef, "moments": asdict(self.score_moments), "health": self.health.state}
        own["held_out"] = self.held_out.state_dict()
        return {**self.learner.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)
        self.kl_coef, self.score_moments = state["kl_coef"], RunningMoments(**state["moments"])
        self.health.state = state["health"]
        self.held_out.load_state_dict(state["held_out"])
