"""Settings of PPO: which rewards, which estimator of advantages, which loss, and how they are sampled for."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from fastrlhf.errors import UserError
from fastrlhf.settings.scoring import ScoringConfig
from fastrlhf.settings.training import REQUIRED, SCHEDULES, LoopConfig, above, at_least, choose, option, rare, within

# summarize: Stiennon et al., as Huang et al. (arXiv 2403.17031) reproduce it; chat: Ouyang et al., as trainers do today
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
GROUPED = ("rloo", "grpo", "dr_grpo", "reinforce++_baseline")  # compare the responses to one prompt
# kl_in and kl_estimator as these were published; the others: reward, k1
KL_OF = {"grpo": ("loss", "k3"), "dr_grpo": ("loss", "k3"), "reinforce++_baseline": ("loss", "k2")}


@dataclass(frozen=True, kw_only=True)
class PPOConfig(ScoringConfig, LoopConfig):
    """PPO against a reward with a KL penalty."""

    may_change = ("steps", *LoopConfig.may_change, "value_learning_rate", "value_schedule")
    reward: str | Callable[..., Any] = option(  # noqa: RUF009
        REQUIRED, "reward model folder, module:function, URL, or several (docs/combining.md)"
    )
    reference: str | None = option(None, "model that the KL is measured to; default: model")
    preset: str = option("summarize", "summarize or chat: which of the defaults a | b hold")
    steps: int = option(100, "PPO steps")
    # the preset fills in what is None here
    learning_rate: float = option(None, "peak learning rate of the policy")
    value_learning_rate: float = option(None, "peak learning rate of the value model")
    schedule: str = option(None, "of the learning rate: constant, linear or cosine (to 0)")
    value_lora_rank: int | None = rare(None, "rank of the value model's adapter; 0: all weights; default: lora_rank")
    value_schedule: str | None = rare(None, "of the value model's learning rate; default: schedule")
    epochs: int = option(None, "passes over the responses of a step")
    minibatches: int = option(1, "optimizer steps a pass")
    # advantages
    estimator: str = option("gae", f"{', '.join(ESTIMATORS[:-1])} or {ESTIMATORS[-1]}")
    samples_per_prompt: int = option(1, "responses to each prompt; batch_size counts responses")
    gamma: float = option(1.0, "discount (gae, reinforce++ and remax)")
    lam: float = option(None, "trace decay of generalised advantage estimation")
    whiten: bool = rare(True, "whiten advantages of gae and reinforce++ over the response tokens of a step")
    share_prompts: bool = rare(True, "train on the responses to a prompt with one copy of it, where models allow it")
    # the KL to the reference
    kl_coef: float = option(None, "weight of the KL penalty")
    kl_estimator: str = rare(None, "of the KL at a token: k1, k2 or k3; default: k1, or the published one (kl_in)")
    kl_in: str = rare(None, "reward or loss; default: loss for (dr_)grpo (k3), reinforce++_baseline (k2)")
    kl_target: float | None = option(None, "adapt kl_coef to reach this KL (nats a response); default: fixed")
    kl_coef_end: float | None = rare(None, "kl_coef goes to this by the last step, its logarithm linearly")
    reference_every: int = rare(0, "steps after which the reference becomes the policy; 0: never")
    # scores and rewards
    score_norm: str = rare("none", "none, scale (by the deviation of all scores so far) or whiten (by mean too)")
    score_clip: float | None = rare(None, "then clip scores to this size")
    missing_eos: str = option("none", "for responses that were cut off: none, subtract:V or replace:V")
    min_response_tokens: int = rare(0, "shorter responses too count as cut off for missing_eos")
    length_penalty: float = rare(0.0, "taken off the score a response token")
    overlong_tokens: int = option(
        0, "the score falls over the last so many tokens before max_new_tokens ...", rare=True
    )
    overlong_penalty: float = rare(1.0, "... by this much")
    whiten_rewards: bool = option(False, "scale rewards to variance 1 over the response tokens", rare=True)
    # losses
    clip_range: float = option(0.2, "clip range of the probability ratio")
    clip_range_high: float | None = rare(None, "its upper side; default: clip_range")
    dual_clip: float | None = option(
        None, "bound of the loss of bad tokens that became far likelier, above 1", rare=True
    )
    clip_range_value: float | None = option(0.2, "clip range of the value's change; none: not clipped")
    value_coef: float = option(0.1, "weight of the value loss")
    entropy_coef: float = option(0.0, "weight of the entropy bonus")
    loss_mean: str = option("token", "of the policy's loss, over each token, sequence, prompt or max_length", rare=True)
    max_update_kl: float | None = option(
        None, "a step's policy updates end at this KL (nats a token) from its start", rare=True
    )
    ptx_data: str | None = rare(None, "demonstrations whose loss is added to the policy's (PPO-ptx)")
    ptx_coef: float = rare(1.0, "weight of that loss")
    ema_decay: float | None = option(
        None, "the final model is this moving average of the policies of all steps", rare=True
    )
    value_warmup_steps: int | None = rare(
        None, "first steps for the value model only; default: 0 with one reward model, else 2"
    )
    samples_every: int = rare(10, "steps between those of which responses are left in samples.jsonl; 0: none")
    # held-out prompts
    eval_data: str | None = option(
        None, "held-out prompts, answered every eval_every steps; the best model is in best/"
    )
    eval_every: int = option(10, "steps between two such answers; the last step has them too")
    eval_reward: str | Callable[..., Any] | None = option(  # noqa: RUF009
        None, "what scores them, as for reward; default: reward", rare=True
    )
    eval_limit: int | None = rare(None, "use only so many held-out prompts")
    eval_greedy: bool = rare(False, "take the likeliest tokens in place of draws, which have the same seeds each time")
    # sampling
    max_prompt_tokens: int = option(512, "longer prompts are rejected")
    max_new_tokens: int = option(128, "length at which responses are cut off")
    temperature: float = option(1.0, "of sampling and of training alike")
    top_k: int = option(0, "sample among so many tokens; needs truncation (so do top_p and min_p)")
    top_p: float = option(1.0, "sample among the likeliest tokens of this total probability")
    min_p: float = option(
        0.0, "sample among tokens of at least this share of the likeliest one's probability", rare=True
    )
    min_new_tokens: int = rare(0, "responses do not end before so many tokens; needs truncation")
    truncation: str = option("refuse", "refuse, model or sampler: whose log-probs the ratio is to after top_k, ...")
    stop: tuple[str, ...] = rare((), "text that ends a response, or a list: [text, text]")
    repeat_ngram: int = rare(0, "a response is cut when its last tokens are some 1 to so many tokens ...")
    repeat_times: int = rare(0, "... so many times over; both 0: never")
    max_slots: int = option(64, "sequences generated at a time")
    kv_budget: float | None = rare(None, "most GiB of their cache of keys and values; fewer run at a time if need be")
    cuda_graphs: bool = rare(True, "on a GPU, replay steps of generation from CUDA graphs")
    offload: str = rare("none", "idle: models and moments rest in the CPU's memory while they do not act (GPU)")
    rollout_url: str | None = rare(None, "URL,URL,... of vLLM servers that generate; default: in this process")
    rollout_model: str = rare("policy", "name under which the servers serve the policy")
    rollout_logprobs: str = rare("raw_logprobs", "the servers' --logprobs-mode: raw_logprobs or processed_logprobs")
    rollout_timeout: float = rare(600.0, "seconds for one response of a server, retries included")
    rollout_key_file: str | None = rare(None, "file with the API key of the servers")
    weight_sync: str | Callable[..., Any] | None = rare(  # noqa: RUF009
        None, "module:function, called with policy and URLs before each rollout; stale: nothing is"
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

    def __post_init__(self) -> None:
        choose(self, "preset", tuple(PRESETS))
        kl_in, kl_estimator = KL_OF.get(str(self.estimator), ("reward", "k1"))
        kl = {"kl_in": kl_in, "kl_estimator": kl_estimator if self.kl_in in (None, kl_in) else "k1"}
        for name, value in {**PRESETS[self.preset], **kl}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        self._check_ranges()
        self._check_sampling()
        self._check_combinations()
        self._check_unused()

    @property
    def rollout_urls(self) -> list[str]:
        """Of the servers; none where there are none."""
        return [url.strip() for url in (self.rollout_url or "").split(",") if url.strip()]

    def _check_ranges(self) -> None:
        choose(self, "value_schedule", SCHEDULES)
        choose(self, "estimator", ESTIMATORS)
        choose(self, "kl_estimator", ("k1", "k2", "k3"))
        choose(self, "kl_in", ("reward", "loss"))
        choose(self, "score_norm", ("none", "scale", "whiten"))
        choose(self, "loss_mean", ("token", "sequence", "prompt", "max_length"))
        choose(self, "offload", ("none", "idle"))
        choose(self, "truncation", ("refuse", "model", "sampler"))
        choose(self, "rollout_logprobs", ("raw_logprobs", "processed_logprobs"))
        parse_missing_eos(self.missing_eos)
        at_least(self, 1, "steps", "epochs", "minibatches", "max_prompt_tokens", "max_new_tokens", "max_slots")
        at_least(self, 1, "samples_per_prompt", "eval_every", "eval_limit")
        at_least(self, 0, "value_lora_rank")
        above(self, 0, "value_learning_rate", "value_coef", "temperature", "kl_target", "kl_coef_end", "score_clip")
        above(self, 0, "clip_range", "clip_range_high", "clip_range_value", "max_update_kl", "kv_budget")
        above(self, 1, "dual_clip")
        at_least(self, 0, "kl_coef", "entropy_coef", "value_warmup_steps", "reference_every", "min_response_tokens")
        at_least(self, 0, "min_new_tokens", "samples_every", "overlong_tokens", "overlong_penalty", "ptx_coef", "top_k")
        above(self, 0, "top_p", "rollout_timeout")
        within(self, 0, 1, "gamma", "lam", "ema_decay", "top_p", "min_p", "clip_range")
        if self.ema_decay == 1:
            raise UserError("ema_decay must be below 1, or the final model is the one that the run starts from")

    def _check_sampling(self) -> None:
        truncating = (self.top_k, self.top_p, self.min_p, self.min_new_tokens) != (0, 1.0, 0.0, 0)
        given = f"top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}, min_new_tokens={self.min_new_tokens}"
        if self.truncation == "refuse" and truncating:
            raise UserError(
                f"{given}: the sampler would draw from another "
                "distribution than the one that is trained; set truncation to model (ratios to the model's own "
                "log-probabilities, a bias) or sampler (ratios to those of the draws, which start away from 1)"
            )
        if (self.repeat_ngram, self.repeat_times) != (0, 0) and (self.repeat_ngram < 1 or self.repeat_times < 2):
            expected = "repeat_ngram must be at least 1 and repeat_times at least 2, or both 0"
            raise UserError(f"{expected}, got {self.repeat_ngram} and {self.repeat_times}")
        if self.rollout_url is None:
            return
        if not self.rollout_urls or not all(u.startswith(("http://", "https://")) for u in self.rollout_urls):
            raise UserError(f"rollout_url must be URL,URL,... of http:// or https://, got {self.rollout_url!r}")
        if self.weight_sync is None:
            raise UserError(
                "rollout_url: give weight_sync=module:function, which brings the policy's weights to the servers "
                "(docs/rollout.md), or weight_sync=stale if they shall keep those that they have"
            )
        if self.parallel == "fsdp":
            raise UserError("rollout_url: no process has all weights under parallel=fsdp, for weight_sync to bring")
        if not 0.01 <= self.temperature <= 2:
            raise UserError(f"temperature must be from 0.01 to 2 with rollout_url, got {self.temperature}")
        if truncating:
            raise UserError(f"{given}: a server tells log-probabilities before or after these, not both")
        greedy = "remax" if self.estimator == "remax" else "eval_greedy"
        if self.temperature != 1 and (greedy == "remax" or (self.eval_greedy and self.ema_decay is None)):
            text = "a server tells log-probabilities of a greedy response at temperature 1"
            raise UserError(f"{greedy}: {text}, not {self.temperature}")
        if self.temperature != 1 and self.rollout_logprobs == "raw_logprobs":
            advice = "start the servers with --logprobs-mode processed_logprobs and set rollout_logprobs to that"
            raise UserError(f"temperature={self.temperature}: raw_logprobs are those of temperature 1; {advice}")

    def _check_combinations(self) -> None:
        if self.offload == "idle" and self.parallel == "fsdp":
            raise UserError("offload=idle moves whole models; with parallel=fsdp their shards stay on the GPU")
        if self.minibatches > self.batch_size:
            raise UserError(f"minibatches ({self.minibatches}) must not exceed batch_size ({self.batch_size})")
        if self.batch_size % self.samples_per_prompt:
            counts = f"batch_size ({self.batch_size}) must be a multiple of samples_per_prompt"
            raise UserError(f"{counts} ({self.samples_per_prompt})")
        num_prompts = self.batch_size // self.samples_per_prompt
        if self.loss_mean == "prompt" and self.minibatches > num_prompts:
            counts = f"minibatches ({self.minibatches}) must not exceed the {num_prompts}"
            raise UserError(f"loss_mean=prompt keeps the responses to a prompt together: {counts} prompts of a step")
        if self.estimator in GROUPED and self.samples_per_prompt == 1:
            raise UserError(f"{self.estimator} compares the responses to a prompt: samples_per_prompt must be above 1")
        if self.value_warmup_steps is not None and self.value_warmup_steps >= self.steps:
            counts = f"value_warmup_steps ({self.value_warmup_steps}) must be less than steps ({self.steps})"
            raise UserError(f"{counts}, or the policy is never trained")
        if self.kl_target is not None and self.kl_coef_end is not None:
            raise UserError("give kl_target (adapts kl_coef) or kl_coef_end (plans it), not both")
        if self.kl_coef == 0 and (self.kl_target is not None or self.kl_coef_end is not None):
            raise UserError("kl_target and kl_coef_end multiply kl_coef, which must start above 0")
        if self.reference_every and self.lora_rank and self.reference not in (None, self.model):
            raise UserError("reference_every: an adapter cannot become the reference, which is another model")
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UserError("kl_in=loss: the mean gradient of k1 is 0, so it penalises nothing; use k2 or k3")
        if self.max_update_kl is not None and self.truncation == "sampler":
            raise UserError("max_update_kl: with truncation=sampler ratios start away from 1, which it takes for a KL")
        for name in ("overlong_tokens", "min_response_tokens", "min_new_tokens"):
            if getattr(self, name) > self.max_new_tokens:
                sizes = f"{name} ({getattr(self, name)}) must not exceed max_new_tokens ({self.max_new_tokens})"
                raise UserError(sizes)

    def _check_unused(self) -> None:
        """Raises ValueError for an option that would do nothing beside the others, unless it has its default."""
        no_values = f"{self.estimator} has no value model" if self.estimator != "gae" else ""
        whole = f"{self.estimator} compares whole responses" if self.estimator in GROUPED else ""
        servers = "" if self.rollout_url is not None else "give rollout_url"
        engine = "" if self.rollout_url is None else "the servers of rollout_url generate"
        baseline = "the baseline of remax is not whitened" if self.estimator == "remax" else ""
        reasons = {
            "value_warmup_steps": no_values,
            "value_schedule": no_values,
            "value_lora_rank": no_values,
            "value_coef": no_values,
            "clip_range_value": no_values,
            "gamma": whole,
            "whiten_rewards": whole or baseline,
            "min_response_tokens": "" if self.missing_eos != "none" else "set missing_eos: what short responses get",
            "overlong_penalty": "" if self.overlong_tokens else "set overlong_tokens: where it begins",
            **dict.fromkeys(
                ("eval_every", "eval_reward", "eval_limit", "eval_greedy"),
                "" if self.eval_data is not None else "give eval_data",
            ),
            **dict.fromkeys(("rollout_model", "rollout_logprobs", "rollout_timeout", "rollout_key_file"), servers),
            "weight_sync": servers,
            "kv_budget": engine,
            "cuda_graphs": engine,
            "ptx_coef": "" if self.ptx_data is not None else "give ptx_data",
        }
        for field in fields(self):
            if reasons.get(field.name) and getattr(self, field.name) != field.default:
                raise UserError(f"{field.name}: {reasons[field.name]}")


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
