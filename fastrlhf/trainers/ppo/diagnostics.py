"""What a PPO step tells about itself, and the rules by which a run looks ill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastrlhf.generation.engine import Sample
from fastrlhf.ops import approx_kl
from fastrlhf.packing import Packed
from fastrlhf.runtime.metrics import Statistics

# mean |difference| of log-probabilities between servers and trainer: equal weights have 1e-5 in float32, 0.01 in bf16
MAX_DIFFERENCE = 0.05
NUM_SAMPLES = 4  # of a step that are left in samples.jsonl


def describe(
    batch: Packed,
    samples: Sequence[Sample],
    scores: Tensor,
    terms: dict[str, Tensor],
    advantage_stats: dict[str, Tensor],
    stats: Sequence[Statistics],
) -> dict[str, Any]:
    """The metrics of a step under the names the field knows.

    batch: fields logprobs, rollout_logprobs (those of the sampler) and ref_logprobs
    scores: (N,); terms: by name the scores (N,) that these are made of
    advantage_stats: what `with_advantages` says; stats: of the updates"""
    lengths = batch.cu_responses.diff().float()
    k3 = approx_kl(batch["logprobs"], batch["ref_logprobs"], estimator="k3")
    metrics = {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(correction=0),
        **(scores_of(terms) if len(terms) > 1 else {}),
        "objective/kl": mean_kl(batch),
        "objective/kl_k3": k3.sum() / batch.num_sequences,
        "objective/rlhf_reward": advantage_stats["rewards"],
        "objective/entropy": -batch["logprobs"].mean(),
        "objective/advantages": advantage_stats["advantages"],
        "objective/advantages_std": advantage_stats["advantages_std"],
        "response/length": lengths.mean(),
        "response/length_p50": lengths.quantile(0.5),
        "response/length_p90": lengths.quantile(0.9),
        "response/length_max": lengths.max(),
        "response/eos_rate": sum(sample.finished for sample in samples) / len(samples),
        **diversity(samples),
        "num_tokens": batch.num_tokens_unshared,
    }
    for name, value in (
        ("ppo/value/mean", "values"),
        ("ppo/returns/mean", "returns"),
        ("ppo/value/explained_variance", "explained_variance"),
        ("objective/frac_reward_zero_std", "equal_groups"),
    ):
        if value in advantage_stats:
            metrics[name] = advantage_stats[value]
    if "ppo/policy/ratio_max" in stats[0].values:  # before the first update
        metrics["ppo/policy/first_ratio_max"] = stats[0].values["ppo/policy/ratio_max"]
        metrics["ppo/policy/first_ratio_min"] = stats[0].values["ppo/policy/ratio_min"]
    return metrics | rollout_difference(batch, stats[0]) | Statistics.mean(stats)


def mean_kl(batch: Packed) -> Tensor:
    """The KL to the reference (k1) in nats a response: summed over a response, then averaged."""
    return (batch["logprobs"] - batch["ref_logprobs"]).sum() / batch.num_sequences


def scores_of(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean and standard deviation of the scores of each term."""
    means = {f"objective/scores/{name}": scores.mean() for name, scores in terms.items()}
    return means | {f"objective/scores_std/{name}": scores.std(correction=0) for name, scores in terms.items()}


def rollout_difference(batch: Packed, first: Statistics) -> dict[str, Tensor]:
    """Mean and maximum of |log p of the trainer - log p of the sampler| over tokens that both have computed anyway: all
    of them, or, where the trainer took over the sampler's, those of the first update, if it is one of the policy."""
    gaps = (batch["logprobs"] - batch["rollout_logprobs"]).abs()
    found = {"": gaps.mean(), "_max": gaps.max()}
    if not gaps.any():
        prefix = "ppo/policy/logprob_change"
        found = {end: first.values[prefix + end] for end in found if prefix + end in first.values}
    return {f"rollout/logprob_difference{end}": value for end, value in found.items()}


def diversity(samples: Sequence[Sample]) -> dict[str, float]:
    """Shares of tokens and of pairs of neighbours that are distinct, over all responses, and of responses that are
    distinct among those to the same prompt.

    Source: Li et al., arXiv 1510.03055 (distinct-1, distinct-2)."""
    tokens = [token for sample in samples for token in sample.response]
    pairs = [pair for sample in samples for pair in zip(sample.response, sample.response[1:], strict=False)]
    whole = {(*sample.prompt, -1, *sample.response) for sample in samples}
    return {
        "response/distinct_1": len(set(tokens)) / len(tokens),
        "response/distinct_2": len(set(pairs)) / max(len(pairs), 1),
        "response/unique": len(whole) / len(samples),
    }


class HealthChecks:
    """Says in words when a run looks ill, each rule once; `state` belongs to a checkpoint.

    ratios_start_at_one: whether the ratios of a step's first update should be 1
    weights_are_synced: whether servers generate, with weights that weight_sync brings"""

    def __init__(self, *, ratios_start_at_one: bool = True, weights_are_synced: bool = False) -> None:
        self.ratios_start_at_one, self.weights_are_synced = ratios_start_at_one, weights_are_synced
        self.state: dict[str, Any] = {"first": {}, "said": [], "best": None}

    def check(self, metrics: dict[str, float]) -> list[str]:
        """Returns what is to be said after a step with these metrics."""
        first = self.state["first"]
        for name in ("objective/entropy", "response/length"):
            first.setdefault(name, metrics[name])
        length, entropy = metrics["response/length"], metrics["objective/entropy"]
        kl, worst = metrics["objective/kl"] / length, 0.0
        for name in ("max", "min"):
            worst = max(worst, abs(metrics.get(f"ppo/policy/first_ratio_{name}", 1.0) - 1))
        gap = metrics.get("rollout/logprob_difference", 0.0)
        rules = {
            "servers": (
                self.weights_are_synced and not gap <= MAX_DIFFERENCE,
                f"log-probabilities of the servers are {gap:.3g} away from the policy's on average (rounding: below "
                f"{MAX_DIFFERENCE:g}): they may not have its weights (a prefix cache of earlier weights, a head that "
                "is tied to the embeddings, weight_sync) or tell others (--logprobs-mode, quantisation)",
            ),
            "held_out": self.over_optimised(metrics),
            "kl": (
                kl < -0.05,
                f"the KL to the reference is {kl:.3f} nats a token; no KL is negative: tokens are not drawn from the "
                "distribution that is trained (top_k, top_p, another temperature)",
            ),
            "ratio": (
                self.ratios_start_at_one and worst > 0.1,
                f"before the first update of the step a ratio is {worst:.2f} away from 1: sampler and trainer disagree",
            ),
            "entropy": (
                entropy < 0.1 * first["objective/entropy"],
                f"the entropy fell from {first['objective/entropy']:.3f} to {entropy:.3f} nats a token: the policy "
                "hardly explores any more (larger kl_coef or entropy_coef, smaller learning_rate)",
            ),
            "length": (
                length > 2 * first["response/length"] and metrics["response/eos_rate"] < 0.5,
                f"responses grew from {first['response/length']:.0f} to {length:.0f} tokens and most are cut off: the "
                "reward may like length (missing_eos, length_penalty, overlong_tokens)",
            ),
        }
        new = [name for name, (ill, _) in rules.items() if ill and name not in self.state["said"]]
        self.state["said"] = [*self.state["said"], *new]
        return [f"warning: {rules[name][1]}" for name in new]

    def over_optimised(self, metrics: dict[str, float]) -> tuple[bool, str]:
        """Whether the reward went up while held-out answers became worse than the best by more than chance makes of
        answers that stay as good; and the words for it."""
        if "eval/score" not in metrics:
            return False, ""
        now = {name: metrics[name] for name in ("objective/scores", "eval/score")}
        best = self.state["best"] or now
        if now["eval/score"] >= best["eval/score"]:
            self.state["best"] = best = now
        fall, limit = metrics["eval/fall"], metrics["eval/fall_limit"]
        return (
            fall > limit and now["objective/scores"] > best["objective/scores"],
            f"the reward rose from {best['objective/scores']:.3g} to {now['objective/scores']:.3g} while the score of "
            f"held-out answers fell from {best['eval/score']:.3g}, the best so far, to {now['eval/score']:.3g} (by "
            f"{fall:.3g} on prompts that did not choose the best; chance makes up to {limit:.3g}): the policy may "
            "exploit the reward (larger kl_coef, fewer steps, or take the model in best/)",
        )


def sample_rows(
    samples: Sequence[Sample], batch: Packed, scores: Tensor, tokenizer: Any, number: int = NUM_SAMPLES
) -> list[dict[str, Any]]:
    """The first responses of a step as rows of samples.jsonl; kl is summed over the response."""
    kl = (batch["logprobs"] - batch["ref_logprobs"]).split(batch.response_lengths)
    return [
        {
            "prompt": tokenizer.decode(sample.prompt),
            "response": tokenizer.decode(sample.response),
            "finished": sample.finished,
            "score": float(scores[n]),
            "kl": float(kl[n].sum()),
        }
        for n, sample in enumerate(samples[:number])
    ]
