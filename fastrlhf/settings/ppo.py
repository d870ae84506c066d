"""Settings of PPO: which rewards, which estimator of advantages, which loss, and how they are sampled for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from fastrlhf.errors import UserError
from fastrlhf.settings import ppo_rules
from fastrlhf.settings.objects import ModelSource, RowsSource
from fastrlhf.settings.option import REQUIRED, check, option, rare, reads
from fastrlhf.settings.training import SCHEDULES, ScoringConfig, TrainerConfig

# summarize: of Huang et al. (arXiv 2403.17031); chat: of OpenRLHF (docs/hyperparameters.md)
PRESETS: dict[str, dict[str, Any]] = {
    "summarize": {
        "learning_rate": 3e-6,
        "value_learning_rate": 3e-6,
        "schedule": "linear",
        "epochs": 4,
        "kl_coef": 0.05,
        "lam": 0.95,
    },
    "chat": {
        "learning_rate": 5e-7,
        "value_learning_rate": 9e-6,
        "schedule": "cosine",
        "epochs": 1,
        "kl_coef": 0.01,
        "lam": 1.0,
    },
}
ESTIMATORS = ("gae", "rloo", "grpo", "dr_grpo", "reinforce++", "reinforce++_baseline", "remax")
STALE = "stale"  # weight_sync: the servers keep the weights that they have
GROUPED = ppo_rules.GROUPED
# kl_in and kl_estimator as these were published; the others: reward, k1
KL_OF = {"grpo": ("loss", "k3"), "dr_grpo": ("loss", "k3"), "reinforce++_baseline": ("loss", "k2")}


@dataclass(frozen=True, kw_only=True)
class PPOConfig(ScoringConfig, TrainerConfig):
    """PPO against a reward with a KL penalty."""

    shipped: ClassVar[Mapping[str, str]] = {"data": "prompts.jsonl"}
    reward: ModelSource | Callable[..., Any] = reads(
        REQUIRED, "reward model folder, module:function, URL, or several (docs/combining.md)", object="reward"
    )
    reference: ModelSource | None = reads(None, "model that the KL is measured to; default: model", object="model")
    preset: str = option("summarize", "{}: which of the defaults a | b hold", choices=tuple(PRESETS))
    steps: int = option(100, "PPO steps", at_least=1, resume="plan")
    # the preset fills in what is None here
    learning_rate: float = option(None, "peak learning rate of the policy", above=0, resume="plan")
    value_learning_rate: float = option(None, "peak learning rate of the value model", above=0, resume="plan")
    schedule: str = option(None, "of the learning rate: {} (to 0)", choices=SCHEDULES, resume="plan")
    value_lora_rank: int | None = rare(None, "the value model's; 0: all weights; default: lora_rank", at_least=0)
    value_schedule: str | None = rare(None, "for the value model; default: schedule", choices=SCHEDULES, resume="plan")
    epochs: int = option(None, "passes over the responses of a step", at_least=1)
    minibatches: int = option(1, "optimizer steps a pass", at_least=1)
    # advantages
    estimator: str = option("gae", "{}", choices=ESTIMATORS)
    samples_per_prompt: int = option(1, "responses to each prompt; batch_size counts responses", at_least=1)
    gamma: float = option(1.0, "discount (gae, reinforce++ and remax)", between=(0, 1))
    lam: float = option(None, "trace decay of generalised advantage estimation", between=(0, 1))
    whiten: bool = rare(True, "whiten advantages of gae and reinforce++ over the response tokens of a step")
    share_prompts: bool = rare(True, "read a prompt once for all its responses, where models allow it", resume="free")
    # the KL to the reference
    kl_coef: float = option(None, "weight of the KL penalty", at_least=0)
    kl_estimator: str = rare(None, "at a token: {}; default: k1, or the published one (kl_in)", choices="k1 k2 k3")
    kl_in: str = rare(None, "{}; default: loss for (dr_)grpo (k3), reinforce++_baseline (k2)", choices="reward loss")
    kl_target: float | None = option(None, "adapt kl_coef to reach this KL (nats a response); default: fixed", above=0)
    kl_coef_end: float | None = rare(None, "kl_coef goes to this by the last step, its logarithm linearly", above=0)
    reference_every: int = rare(0, "steps after which the reference becomes the policy; 0: never", at_least=0)
    # scores and rewards
    score_norm: str = rare("none", "{}: by the deviation of all scores so far (and mean)", choices="none scale whiten")
    score_clip: float | None = rare(None, "then clip scores to this size", above=0)
    missing_eos: str = option("none", "for responses that were cut off: none, subtract:V or replace:V")
    min_response_tokens: int = rare(0, "shorter responses too count as cut off for missing_eos", at_least=0)
    length_penalty: float = rare(0.0, "taken off the score a response token")
    overlong_tokens: int = rare(0, "the score falls over the last so many tokens before max_new_tokens ...", at_least=0)
    overlong_penalty: float = rare(1.0, "... by this much", at_least=0)
    whiten_rewards: bool = rare(False, "scale rewards to variance 1 over the response tokens")
    # losses
    clip_range: float = option(0.2, "clip range of the probability ratio", above=0, between=(0, 1))
    clip_range_high: float | None = rare(None, "its upper side; default: clip_range", above=0)
    dual_clip: float | None = rare(None, "bound of the loss of bad tokens that became far likelier, above 1", above=1)
    clip_range_value: float | None = option(0.2, "clip range of the value's change; none: not clipped", above=0)
    value_coef: float = option(0.1, "weight of the value loss", above=0)
    entropy_coef: float = option(0.0, "weight of the entropy bonus", at_least=0)
    loss_mean: str = rare("token", "of the policy's loss, over each {}", choices="token sequence prompt max_length")
    max_update_kl: float | None = rare(None, "a step's updates end at this KL (nats a token) from its start", above=0)
    ptx_data: RowsSource | None = rare(
        None, "demonstrations whose loss is added to the policy's (PPO-ptx)", path="input", object="rows"
    )
    ptx_coef: float = rare(1.0, "weight of that loss", at_least=0)
    ema_decay: float | None = rare(None, "the final model is a moving average of the policies", between=(0, 1))
    value_warmup_steps: int | None = rare(
        None, "first steps for the value model only; default: 0 with one reward model, else 2", at_least=0
    )
    samples_every: int = rare(10, "steps between responses in samples.jsonl; 0: none", at_least=0, resume="free")
    # held-out prompts
    eval_data: RowsSource | None = reads(
        None, "held-out prompts, answered every eval_every steps; the best model is in best/", object="rows"
    )
    eval_every: int = option(10, "steps between two such answers; the last step has them too", at_least=1)
    eval_reward: ModelSource | Callable[..., Any] | None = rare(
        None, "what scores them; default: reward", path="input", object="reward"
    )
    eval_limit: int | None = rare(None, "use only so many held-out prompts", at_least=1)
    eval_greedy: bool = rare(False, "take the likeliest tokens in place of draws, which have the same seeds each time")
    # sampling
    max_prompt_tokens: int = option(512, "longer prompts are rejected", at_least=1)
    max_new_tokens: int = option(128, "length at which responses are cut off", at_least=1)
    temperature: float = option(1.0, "of sampling and of training alike", above=0)
    top_k: int = option(0, "sample among so many tokens; needs truncation (so do top_p and min_p)", at_least=0)
    top_p: float = option(1.0, "sample among the likeliest tokens of this total probability", above=0, between=(0, 1))
    min_p: float = rare(0.0, "sample among tokens of at least this share of the highest probability", between=(0, 1))
    min_new_tokens: int = rare(0, "responses do not end before so many tokens; needs truncation", at_least=0)
    truncation: str = option("refuse", "{}: whose log-probs ratios are to after top_k", choices="refuse model sampler")
    stop: tuple[str, ...] = rare((), "text that ends a response, or a list: [text, text]")
    repeat_ngram: int = rare(0, "a response is cut when its last tokens are some 1 to so many tokens ...")
    repeat_times: int = rare(0, "... so many times over; both 0: never")
    max_slots: int = option(64, "sequences generated at a time", at_least=1, resume="free")
    kv_budget: float | None = rare(
        None, "most GiB of their cache of keys and values; fewer run at a time if need be", above=0, resume="free"
    )
    cuda_graphs: bool = rare(True, "on a GPU, replay steps of generation from CUDA graphs", resume="free")
    offload: str = rare(
        "none", "{}: models and moments rest in the CPU's memory between uses (GPU)", choices="none idle", resume="free"
    )
    rollout_url: str | None = rare(None, "URL,URL,... of vLLM servers that generate; default: none", resume="free")
    rollout_model: str = rare("policy", "name under which the servers serve the policy")
    rollout_logprobs: str = rare("raw_logprobs", "their --logprobs-mode: {}", choices="raw_logprobs processed_logprobs")
    rollout_timeout: float = rare(600.0, "seconds for one response, retries included", above=0, resume="free")
    rollout_key_file: str | None = rare(None, "file with the API key of the servers", path="file", resume="free")
    weight_sync: str | Callable[..., Any] | None = rare(
        None, "brings weights to servers: lora, whole or module:function; stale: nothing does", resume="free"
    )

    def has_adapters(self) -> bool:
        return self.lora_rank > 0 or bool(self.value_lora_rank)

    def value_rank(self) -> int:
        """The rank of the value model's adapter, 0 without one."""
        return self.lora_rank if self.value_lora_rank is None else self.value_lora_rank

    def prompt_options(self) -> dict[str, Any]:
        """How prompts are read from a file."""
        names = ("template", "template_kwargs", "max_rejected", "max_prompt_tokens")
        return {name: getattr(self, name) for name in names}

    def fill_in(self) -> None:
        super().fill_in()
        check(self.__dataclass_fields__["preset"], self.preset)
        kl_in, kl_estimator = KL_OF.get(str(self.estimator), ("reward", "k1"))
        kl = {"kl_in": kl_in, "kl_estimator": kl_estimator if self.kl_in in (None, kl_in) else "k1"}
        for name, value in {**PRESETS[self.preset], **kl}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.weight_sync in ("lora", "whole"):
            object.__setattr__(self, "weight_sync", f"fastrlhf.generation.weight_sync:{self.weight_sync}")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        yield from ppo_rules.conflicts(self)
        parse_missing_eos(self.missing_eos)

    def unused(self) -> Iterator[tuple[str, str]]:
        yield from super().unused()
        yield from ppo_rules.unused(self)

    @property
    def rollout_urls(self) -> list[str]:
        """Of the servers; none where there are none."""
        return [url.strip() for url in (self.rollout_url or "").split(",") if url.strip()]


def parse_missing_eos(rule: str) -> tuple[str, float]:
    """Returns ("none" | "subtract" | "replace", V) of a rule such as "subtract:1.0"."""
    kind, _, value = rule.partition(":")
    if rule == "none":
        return "none", 0.0
    if kind in ("subtract", "replace"):
        with suppress(ValueError):
            if math.isfinite(number := float(value)):
                return kind, number
    raise UserError(f"missing_eos: expected none, subtract:V or replace:V with a number V, got {rule!r}")
