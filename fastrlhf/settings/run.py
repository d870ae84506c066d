"""Settings of the main job. Those that are None come from a preset, which follows from the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastrlhf.errors import UserError
from fastrlhf.settings.base import Settings
from fastrlhf.settings.option import did_you_mean, option, reads

# cpu: a quarter of an hour on two cores; gpu: about as long on one
RUN_PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "sft_epochs": 2,
        "num_pairs": 150,
        "num_heldout_pairs": 50,
        "pairs_per_prompt": 1,
        "steps": 8,
        "batch_size": 32,
        "max_new_tokens": 24,
        "num_heldout_prompts": 160,
        "num_best_of_prompts": 48,
        "max_tokens": 1024,
    },
    "gpu": {
        "sft_epochs": 3,
        "num_pairs": 1200,
        "num_heldout_pairs": 400,
        "pairs_per_prompt": 8,
        "steps": 40,
        "batch_size": 128,
        "max_new_tokens": 48,
        "num_heldout_prompts": 160,
        "num_best_of_prompts": 160,
        "max_tokens": 16384,
    },
}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """SFT, pairs, reward model, PPO, evaluation, report."""

    output: str = option("demo", "folder of the run; each stage has its own in it", path="output", resume="free")
    model: str = reads("smollm2", "folder or hub id; smollm2: SmolLM2-135M-Instruct, fetched if need be")
    gold: str = reads("fastrlhf.rewards.gold:plain_answer", "module:function or URL: labels pairs and judges")
    reward_timeout: float = option(3600.0, "seconds for a call of the gold reward", above=0, at_most=1e9, resume="free")
    prompts: str = reads("shipped", "file with prompt and split (reward, ppo, heldout); shipped: 500 questions")
    demonstrations: str = reads("shipped", "file with prompt and completion; shipped: 100 short answers")
    system: str | None = option("", "system turn before each prompt; none: prompts as they are")
    preset: str = option("auto", "cpu, gpu, or auto (by device): defaults of the sizes")
    sft_epochs: int = option(None, "passes over the demonstrations", at_least=1)
    sft_learning_rate: float = option(2e-5, "peak learning rate of SFT", above=0)
    num_pairs: int = option(None, "pairs that the reward model is trained on, before ties are dropped", at_least=1)
    num_heldout_pairs: int = option(None, "pairs of other prompts on which its accuracy is measured", at_least=1)
    pairs_per_prompt: int = option(None, "pairs sampled for a prompt", at_least=1)
    reward_epochs: int = option(1, "passes over the pairs", at_least=1)
    reward_learning_rate: float = option(2e-5, "peak learning rate of the reward model", above=0)
    steps: int = option(None, "PPO steps", at_least=1)
    batch_size: int = option(None, "responses a PPO step", at_least=1)
    epochs: int = option(1, "passes over the responses of a PPO step", at_least=1)
    minibatches: int = option(4, "optimizer steps a pass", at_least=1)
    learning_rate: float = option(2e-5, "peak learning rate of the policy in PPO", above=0)
    value_learning_rate: float = option(3e-5, "peak learning rate of the value model", above=0)
    kl_coef: float = option(0.1, "weight of the KL penalty", at_least=0)
    max_prompt_tokens: int = option(64, "longer prompts are rejected", at_least=1)
    max_new_tokens: int = option(None, "length at which responses are cut off", at_least=1)
    temperature: float = option(1.0, "of all sampling", above=0)
    num_heldout_prompts: int = option(None, "held-out prompts to judge on, before and after PPO", at_least=1)
    answers_per_prompt: int = option(2, "answers to each held-out prompt, before and after: their mean", at_least=1)
    best_of: int = option(4, "responses that best-of-n chooses from, by the reward model", at_least=2)
    num_best_of_prompts: int = option(None, "held-out prompts of best-of-n", at_least=1)
    max_tokens: int = option(None, "tokens a micro-batch: memory and speed, not results", at_least=1, resume="free")
    seed: int = option(0, "seed of everything that is drawn", at_least=0, below=2**31)
    device: str = option("auto", "{}", choices="auto cpu cuda", resume="free")
    resume: bool = option(False, "keep the stages that are complete and continue the one that is not", resume="free")
    overwrite: bool = option(False, "delete an earlier run in the output folder", resume="free")

    def fill_in(self) -> None:
        super().fill_in()
        if self.preset == "auto":
            gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
            object.__setattr__(self, "preset", "gpu" if gpu else "cpu")
        if self.preset not in RUN_PRESETS:
            hint = did_you_mean(self.preset, list(RUN_PRESETS))
            raise UserError(f"preset must be auto, cpu or gpu, got {self.preset!r}{hint}")
        for name, value in RUN_PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.num_best_of_prompts > self.num_heldout_prompts:
            sizes = (
                f"num_best_of_prompts ({self.num_best_of_prompts}), num_heldout_prompts ({self.num_heldout_prompts})"
            )
            yield f"best-of-n uses the first held-out prompts, but of {sizes} the first is larger"
