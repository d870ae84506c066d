"""Settings of what draws several responses to each prompt and chooses: best-of-n, the sweep, over-optimisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastrlhf.settings.option import REQUIRED, option, rare, reads
from fastrlhf.settings.training import ScoringConfig

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
class CandidatesConfig(ScoringConfig):
    """What all three need."""

    model: str = reads(REQUIRED, "folder or hub id of the policy that responds")
    data: str = reads(REQUIRED, "file of prompts (layouts: docs/data.md)")
    output: str = option(REQUIRED, "folder of the results", path="output", resume="free")
    n: int = option(16, "responses to each prompt", at_least=2)
    limit: int | None = option(None, "use only so many rows of the data", at_least=1)
    max_prompt_tokens: int = option(512, "longer prompts are rejected", at_least=1)
    max_new_tokens: int = option(128, "length at which responses are cut off", at_least=1)
    temperature: float = option(1.0, "of sampling", above=0)
    max_slots: int = rare(64, "most responses drawn at once: memory and speed, not results", at_least=1, resume="free")
    resume: bool = option(False, "continue an earlier run in the output folder", resume="free")
    overwrite: bool = option(False, "delete an earlier run in the output folder", resume="free")


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig(CandidatesConfig):
    """The best of n responses to each prompt."""

    reward: str = reads(REQUIRED, "what chooses: as of fastrlhf ppo (docs/combining.md)")
    gold: str | None = reads(None, "what judges the choice: another reward")
    keep_unfinished: bool = option(False, "keep a best response that was cut off (sft would teach to end there)")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(CandidatesConfig):
    """Two rewards over weights of them."""

    first: str = reads(REQUIRED, "a reward (docs/combining.md), say of helpfulness")
    second: str = reads(REQUIRED, "another, say of harmlessness")
    weights: str = option("0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", "of the first, from 0 to 1")
    ppo: str | None = option(None, "settings of fastrlhf ppo (YAML file): train a policy for each weight", path="file")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        for text in map(str.strip, self.weights.split(",")):
            try:
                if not 0 <= float(text) <= 1:
                    yield f"weights must be between 0 and 1, got {text}"
            except ValueError:
                yield f"weights: {text!r} is no number; write 0,0.5,1"
        if len(set(self.shares())) < len(self.shares()):
            yield f"weights: one is given twice in {self.weights}"

    def shares(self) -> list[float]:
        """The weights as numbers."""
        return [float(text) for text in self.weights.split(",")]


@dataclass(frozen=True, kw_only=True)
class OveroptimizeConfig(CandidatesConfig):
    """Gold and proxy reward over the KL."""

    n: int = option(64, "best-of-n: responses to each held-out prompt", at_least=2)
    gold: str = reads(REQUIRED, "reward that labels the pairs and judges: a folder, module:function or URL")
    eval_data: str = reads(REQUIRED, "file of held-out prompts, on which gold and proxy are measured")
    eval_limit: int | None = option(None, "use only so many held-out prompts", at_least=2)
    num_pairs: int = option(256, "pairs that the proxy is trained on, before ties are dropped", at_least=2)
    flip: float = option(0.0, "share of the pairs whose label is turned round", between=(0, 0.5))
    proxy: str | None = reads(None, "model that the proxy starts from; default: model")
    reward_epochs: int = option(1, "passes over the pairs", at_least=1)
    reward_batch_size: int = option(32, "pairs a step", at_least=1)
    reward_learning_rate: float = option(1e-5, "peak learning rate of the proxy", above=0)
    steps: int = option(100, "PPO steps", at_least=1)
    eval_every: int = option(5, "steps between two measurements of PPO", at_least=1)
    batch_size: int = option(32, "responses a PPO step", at_least=1)
    learning_rate: float = option(3e-6, "peak learning rate of the policy in PPO", above=0)
    value_learning_rate: float = option(3e-6, "peak learning rate of the value model", above=0)
    kl_coef: float = option(0.0, "weight of the KL penalty; without one the policy goes furthest", at_least=0)
    ppo: str | None = option(None, "YAML file of further settings of fastrlhf ppo", path="file")
