"""Answers to prompts that PPO does not train on: what they are worth, and after which step they were best."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any

from fastrlhf.data import Prompt, load_prompts
from fastrlhf.errors import UserError
from fastrlhf.generation.sampling import Sample
from fastrlhf.packing import Packed
from fastrlhf.rewards.scorer import Scorer
from fastrlhf.runtime import distributed
from fastrlhf.runtime.fingerprints import fingerprint_tokens
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.stats.falls import Falls
from fastrlhf.stats.means import Mean

FIRST = 2**31  # number of the first held-out answer, above that of any answer that is trained on


def load_eval_prompts(config: PPOConfig, tokenizer: Any, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Returns the held-out prompts, none without eval_data; says how many of them are among the prompts, too."""
    if config.eval_data is None:
        return []
    loaded = load_prompts(config.eval_data, tokenizer, limit=config.eval_limit, **config.prompt_options())
    distributed.print_once(loaded.report)
    seen = {tuple(prompt.tokens) for prompt in prompts}
    if shared := sum(tuple(prompt.tokens) in seen for prompt in loaded.rows):
        text = f"{shared} of the {len(loaded.rows)} prompts of {config.eval_data} are trained on too"
        distributed.print_once(f"warning: {text}")
    return loaded.rows


def load_scorers(
    config: PPOConfig, tokenizer: Any, prompts: Sequence[Prompt], eval_prompts: Sequence[Prompt], **options: Any
) -> tuple[Scorer, Scorer]:
    """Returns the scorer of the responses that are trained on, and that of the answers to held-out prompts, which is
    the same without eval_reward. options: device, autocast and base of the reward models"""
    options |= {"max_tokens": config.max_tokens, **config.reward_options()}
    columns, eval_columns = ({name for row in rows for name in row.columns} for rows in (prompts, eval_prompts))
    scorer = Scorer(config.reward, tokenizer, columns=columns, **options)
    if config.eval_reward is None:
        return scorer, scorer
    return scorer, Scorer(config.eval_reward, tokenizer, columns=eval_columns, **options)


class HeldOut:
    """Held-out prompts and what judges the answers to them, at the start, after every eval_every-th step and the last.

    trained: the scorer whose reward is trained on; scorer: of eval_reward, or else `trained`
    seeds: of the answers, the same each time, so that policies differ and not draws
    best: step and score of the best answers so far, empty before the first"""

    def __init__(self, config: PPOConfig, prompts: Sequence[Prompt], *, trained: Scorer, scorer: Scorer) -> None:
        self.config, self.prompts, self.trained, self.scorer = config, prompts, trained, scorer
        self.best: dict[str, Any] = {}
        self.falls = Falls()

    def __len__(self) -> int:
        return len(self.prompts)

    def apart(self) -> HeldOut:
        """A copy, whose notes are not the run's."""
        other = copy(self)
        other.best, other.falls = dict(self.best), deepcopy(self.falls)
        return other

    @property
    def seeds(self) -> range:
        first = (self.config.seed << 32) + FIRST
        return range(first, first + len(self.prompts))

    def is_due(self, step: int) -> bool:
        """Whether the policy answers after step 1, 2, ..., or 0, before the first."""
        return bool(self.prompts) and (step % self.config.eval_every == 0 or step == self.config.steps)

    def judge(self, step: int, samples: Sequence[Sample], batch: Packed) -> dict[str, float]:
        """The metrics of the answers after a step, of which `best` takes note; batch: the pack of the samples.

        eval/score_error is the standard error of the mean eval/score, NaN for one answer. eval/fall is the fall since
        the best step: half of the prompts choose that step, the other half measure. eval/fall_limit is the largest
        fall that chance explains."""
        scores = self.scorer(self.prompts, samples, batch)
        found, fall = Mean.of(scores), self.falls.add(scores)
        if not self.best or found.mean > self.best["score"]:
            self.best.update(step=step, score=found.mean)
        metrics = {
            "eval/score": found.mean,
            "eval/score_error": found.error,
            "eval/fall": fall.mean,
            "eval/fall_limit": self.falls.limit(fall),
            "eval/length": sum(len(sample.response) for sample in samples) / len(samples),
            "eval/eos_rate": sum(sample.finished for sample in samples) / len(samples),
            "eval/best_step": self.best["step"],
            "eval/best_score": self.best["score"],
        }
        if self.scorer is not self.trained:
            metrics["eval/trained_score"] = Mean.of(self.trained(self.prompts, samples, batch)).mean
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The best so far, what falls are measured from, and a checksum of the prompts."""
        prompts = fingerprint_tokens(prompt.tokens for prompt in self.prompts)
        return {"best": dict(self.best), "falls": deepcopy(self.falls.state), "prompts": prompts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what state_dict gave; raises ValueError when the prompts are others."""
        if state["prompts"] != self.state_dict()["prompts"]:
            raise UserError(f"resume: the tokens of {self.config.eval_data} are no longer those of the checkpoint")
        self.best.update(state["best"] or {})
        self.falls.state = state.get("falls", self.falls.state)  # an older checkpoint has none
