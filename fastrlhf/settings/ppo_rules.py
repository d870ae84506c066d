"""What combinations of PPO's options (c) are refused for, and which options do nothing beside others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastrlhf.settings.ppo import PPOConfig

GROUPED = ("rloo", "grpo", "dr_grpo", "reinforce++_baseline")  # compare the responses to one prompt


def conflicts(c: PPOConfig) -> Iterator[str]:
    yield from _sizes(c)
    yield from _kl(c)
    yield from _sampling(c)
    if c.rollout_url is not None:
        yield from _servers(c)
    if c.offload == "idle" and c.parallel == "fsdp":
        yield "offload=idle moves whole models; with parallel=fsdp their shards stay on the GPU"
    if c.ema_decay == 1:
        yield "ema_decay must be below 1, or the final model is the one that the run starts from"


def unused(c: PPOConfig) -> Iterator[tuple[str, str]]:
    """(options, why they do nothing)"""
    if c.estimator != "gae":
        values = "value_warmup_steps value_schedule value_lora_rank value_coef clip_range_value"
        yield values, f": {c.estimator} has no value model"
    if c.estimator in GROUPED:
        yield "gamma whiten_rewards", f": {c.estimator} compares whole responses"
    if c.estimator == "remax":
        yield "whiten_rewards", ": the baseline of remax is not whitened"
    if c.missing_eos == "none":
        yield "min_response_tokens", ": set missing_eos: what short responses get"
    if not c.overlong_tokens:
        yield "overlong_penalty", ": set overlong_tokens: where it begins"
    if c.eval_data is None:
        yield "eval_every eval_reward eval_limit eval_greedy", ": give eval_data"
    if c.ptx_data is None:
        yield "ptx_coef", ": give ptx_data"
    if c.rollout_url is None:
        yield "rollout_model rollout_logprobs rollout_timeout rollout_key_file weight_sync", ": give rollout_url"
    else:
        yield "kv_budget cuda_graphs", ": the servers of rollout_url generate"


def _sizes(c: PPOConfig) -> Iterator[str]:
    if c.minibatches > c.batch_size:
        yield f"minibatches ({c.minibatches}) must not exceed batch_size ({c.batch_size})"
    num_prompts, rest = divmod(c.batch_size, c.samples_per_prompt)
    if rest:
        yield f"batch_size ({c.batch_size}) must be a multiple of samples_per_prompt ({c.samples_per_prompt})"
    if c.loss_mean == "prompt" and c.minibatches > num_prompts:
        counts = f"minibatches ({c.minibatches}) must not exceed the {num_prompts} prompts of a step"
        yield f"loss_mean=prompt keeps the responses to a prompt together: {counts}"
    if c.estimator in GROUPED and c.samples_per_prompt == 1:
        yield f"{c.estimator} compares the responses to a prompt: samples_per_prompt must be above 1"
    if c.value_warmup_steps is not None and c.value_warmup_steps >= c.steps:
        counts = f"value_warmup_steps ({c.value_warmup_steps}) must be less than steps ({c.steps})"
        yield f"{counts}, or the policy is never trained"
    for name in ("overlong_tokens", "min_response_tokens", "min_new_tokens"):
        if getattr(c, name) > c.max_new_tokens:
            yield f"{name} ({getattr(c, name)}) must not exceed max_new_tokens ({c.max_new_tokens})"


def _kl(c: PPOConfig) -> Iterator[str]:
    if c.kl_target is not None and c.kl_coef_end is not None:
        yield "give kl_target (adapts kl_coef) or kl_coef_end (plans it), not both"
    if c.kl_coef == 0 and (c.kl_target is not None or c.kl_coef_end is not None):
        yield "kl_target and kl_coef_end multiply kl_coef, which must start above 0"
    if c.reference_every and c.lora_rank and c.reference not in (None, c.model):
        yield "reference_every: an adapter cannot become the reference, which is another model"
    if c.kl_in == "loss" and c.kl_estimator == "k1":
        yield "kl_in=loss: the mean gradient of k1 is 0, so it penalises nothing; use k2 or k3"
    if c.max_update_kl is not None and c.truncation == "sampler":
        yield "max_update_kl: with truncation=sampler ratios start away from 1, which it takes for a KL"


def _truncates(c: PPOConfig) -> bool:
    return (c.top_k, c.top_p, c.min_p, c.min_new_tokens) != (0, 1.0, 0.0, 0)


def _truncation(c: PPOConfig) -> str:
    return f"top_k={c.top_k}, top_p={c.top_p}, min_p={c.min_p}, min_new_tokens={c.min_new_tokens}"


def _sampling(c: PPOConfig) -> Iterator[str]:
    if c.truncation == "refuse" and _truncates(c):
        yield (
            f"{_truncation(c)}: the sampler would draw from another "
            "distribution than the one that is trained; set truncation to model (ratios to the model's own "
            "log-probabilities, a bias) or sampler (ratios to those of the draws, which start away from 1)"
        )
    if (c.repeat_ngram, c.repeat_times) != (0, 0) and (c.repeat_ngram < 1 or c.repeat_times < 2):
        expected = "repeat_ngram must be at least 1 and repeat_times at least 2, or both 0"
        yield f"{expected}, got {c.repeat_ngram} and {c.repeat_times}"


def _servers(c: PPOConfig) -> Iterator[str]:
    if not c.rollout_urls or not all(url.startswith(("http://", "https://")) for url in c.rollout_urls):
        yield f"rollout_url must be URL,URL,... of http:// or https://, got {c.rollout_url!r}"
    if c.weight_sync is None:
        yield (
            "rollout_url: give weight_sync=module:function, lora or whole, which brings the policy's weights to the "
            "servers (docs/rollout.md), or weight_sync=stale if they shall keep those that they have"
        )
    if c.parallel == "fsdp":
        yield "rollout_url: no process has all weights under parallel=fsdp, for weight_sync to bring"
    if not 0.01 <= c.temperature <= 2:
        yield f"temperature must be from 0.01 to 2 with rollout_url, got {c.temperature}"
    if _truncates(c):
        yield f"{_truncation(c)}: a server tells log-probabilities before or after these, not both"
    greedy = "remax" if c.estimator == "remax" else "eval_greedy"
    if c.temperature != 1 and (greedy == "remax" or (c.eval_greedy and c.ema_decay is None)):
        text = "a server tells log-probabilities of a greedy response at temperature 1"
        yield f"{greedy}: {text}, not {c.temperature}"
    if c.temperature != 1 and c.rollout_logprobs == "raw_logprobs":
        advice = "start the servers with --logprobs-mode processed_logprobs and set rollout_logprobs to that"
        yield f"temperature={c.temperature}: raw_logprobs are those of temperature 1; {advice}"
