"""Settings of what draws several responses to each prompt and chooses: best-of-n, the sweep, over-optimisation."""

from __future__ import annotations

from dataclasses import dataclass

from fastrlhf.errors import UserError
from fastrlhf.settings.scoring import ScoringConfig
from fastrlhf.settings.training import REQUIRED, above, at_least, option, rare, within

# settings that loops have too
SHARED = (
    "model",
    "data",
    "limit",
    "max_tokens",
    "max_rejected",
    "template",
    "template_kwargs",
    "seed",
    "device",
    "dtype",
)


@dataclass(frozen=True, kw_only=True)
class SearchConfig(ScoringConfig):
    """What all three need."""

    model: str = option(REQUIRED, "folder or hub id of the policy that responds")
    data: str = option(REQUIRED, "file of prompts (layouts: docs/data.md)")
    output: str = option(REQUIRED, "folder of the results")
    n: int = option(16, "responses to each prompt")
    limit: int | None = option(None, "use only so many rows of the data")
    max_prompt_tokens: int = option(512, "longer prompts are rejected")
    max_new_tokens: int = option(128, "length at which responses are cut off")
    temperature: float = option(1.0, "of sampling")
    max_slots: int = rare(64, "most responses drawn at once: memory and speed, not results")
    resume: bool = option(False, "continue an earlier run in the output folder")
    overwrite: bool = option(False, "delete an earlier run in the output folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "n")
        at_least(self, 1, "limit", "max_prompt_tokens", "max_new_tokens", "max_slots")
        above(self, 0, "temperature")
        if self.resume and self.overwrite:
            raise UserError("resume and overwrite exclude each other")


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig(SearchConfig):
    """The best of n responses to each prompt."""

    reward: str = option(REQUIRED, "what chooses: as of fastrlhf ppo (docs/combining.md)")
    gold: str | None = option(None, "what judges the choice: another reward")
    keep_unfinished: bool = option(False, "keep a best response that was cut off (sft would teach to end there)")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(SearchConfig):
    """Two rewards over weights of them."""

    first: str = option(REQUIRED, "a reward (docs/combining.md), say of helpfulness")
    second: str = option(REQUIRED, "another, say of harmlessness")
    weights: str = option("0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", "of the first, from 0 to 1")
    ppo: str | None = option(None, "YAML file of settings of fastrlhf ppo: train a policy for each weight too")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shares()

    def shares(self) -> list[float]:
        """The weights as numbers. Raises: ValueError for one that is none, or is outside [0, 1]."""
        shares = []
        for text in self.weights.split(","):
            try:
                shares.append(float(text))
            except ValueError:
                raise UserError(f"weights: {text.strip()!r} is no number; write 0,0.5,1") from None
            if not 0 <= shares[-1] <= 1:
                raise UserError(f"weights must be between 0 and 1, got {text.strip()}")
        if len(set(shares)) < len(shares):
            raise UserError(f"weights: one is given twice in {self.weights}")
        return shares


@dataclass(frozen=True, kw_only=True)
class OveroptimizeConfig(SearchConfig):
    """Gold and proxy reward over the KL."""

    n: int = option(64, "best-of-n: responses to each held-out prompt")
    gold: str = option(REQUIRED, "reward that labels the pairs and judges: a folder, module:function or URL")
    eval_data: str = option(REQUIRED, "file of held-out prompts, on which gold and proxy are measured")
    eval_limit: int | None = option(None, "use only so many held-out prompts")
    num_pairs: int = option(256, "pairs that the proxy is trained on, before ties are dropped")
    flip: float = option(0.0, "share of the pairs whose label is turned round")
    proxy: str | None = option(None, "model that the proxy starts from; default: model")
    reward_epochs: int = option(1, "passes over the pairs")
    reward_batch_size: int = option(32, "pairs a step")
    reward_learning_rate: float = option(1e-5, "peak learning rate of the proxy")
    steps: int = option(100, "PPO steps")
    eval_every: int = option(5, "steps between two measurements of PPO")
    batch_size: int = option(32, "responses a PPO step")
    learning_rate: float = option(3e-6, "peak learning rate of the policy in PPO")
    value_learning_rate: float = option(3e-6, "peak learning rate of the value model")
    kl_coef: float = option(0.0, "weight of the KL penalty; without one the policy goes furthest")
    ppo: str | None = option(None, "YAML file of further settings of fastrlhf ppo")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "num_pairs", "eval_limit")
        at_least(self, 1, "steps", "eval_every")
        within(self, 0, 0.5, "flip")
