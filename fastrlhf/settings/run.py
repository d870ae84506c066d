"""Settings of the main job. Those that are None come from a preset, which follows from the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fastrlhf.errors import UserError
from fastrlhf.settings.training import did_you_mean, option
from fastrlhf.settings.values import convert_all, field_types

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
class RunConfig:
    """SFT, pairs, reward model, PPO, evaluation, report."""

    output: str = option("demo", "folder of the run; each stage has its own in it")
    model: str = option("smollm2", "folder or hub id; smollm2: SmolLM2-135M-Instruct, fetched if need be")
    gold: str = option("fastrlhf.rewards.gold:plain_answer", "module:function or URL: labels pairs and judges")
    reward_timeout: float = option(3600.0, "seconds for one call of the gold reward")
    prompts: str = option("shipped", "file with prompt and split (reward, ppo, heldout); shipped: 500 questions")
    demonstrations: str = option("shipped", "file with prompt and completion; shipped: 100 short answers")
    system: str | None = option("", "system turn before each prompt; none: prompts as they are")
    preset: str = option("auto", "cpu, gpu, or auto (by device): defaults of the sizes")
    sft_epochs: int = option(None, "passes over the demonstrations")
    sft_learning_rate: float = option(2e-5, "peak learning rate of SFT")
    num_pairs: int = option(None, "pairs that the reward model is trained on, before ties are dropped")
    num_heldout_pairs: int = option(None, "pairs of other prompts on which its accuracy is measured")
    pairs_per_prompt: int = option(None, "pairs sampled for a prompt")
    reward_epochs: int = option(1, "passes over the pairs")
    reward_learning_rate: float = option(2e-5, "peak learning rate of the reward model")
    steps: int = option(None, "PPO steps")
    batch_size: int = option(None, "responses a PPO step")
    epochs: int = option(1, "passes over the responses of a PPO step")
    minibatches: int = option(4, "optimizer steps a pass")
    learning_rate: float = option(2e-5, "peak learning rate of the policy in PPO")
    value_learning_rate: float = option(3e-5, "peak learning rate of the value model")
    kl_coef: float = option(0.1, "weight of the KL penalty")
    max_prompt_tokens: int = option(64, "longer prompts are rejected")
    max_new_tokens: int = option(None, "length at which responses are cut off")
    temperature: float = option(1.0, "of all sampling")
    num_heldout_prompts: int = option(None, "held-out prompts to judge on, before and after PPO")
    answers_per_prompt: int = option(2, "answers to each held-out prompt, before and after; their mean counts")
    best_of: int = option(4, "responses that best-of-n chooses from, by the reward model")
    num_best_of_prompts: int = option(None, "held-out prompts of best-of-n")
    max_tokens: int = option(None, "tokens a micro-batch: memory and speed, not results")
    seed: int = option(0, "seed of everything that is drawn")
    device: str = option("auto", "auto, cpu or cuda")
    resume: bool = option(False, "keep the stages that are complete and continue the one that is not")
    overwrite: bool = option(False, "delete an earlier run in the output folder")

    def __post_init__(self) -> None:
        if self.preset == "auto":
            gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
            object.__setattr__(self, "preset", "gpu" if gpu else "cpu")
        if self.preset not in RUN_PRESETS:
            raise UserError(
                f"preset must be auto, cpu or gpu, got {self.preset!r}{did_you_mean(self.preset, list(RUN_PRESETS))}"
            )
        for name, value in RUN_PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        convert_all(self)
        for name, kind in field_types(type(self)).items():
            value = getattr(self, name)
            if name != "seed" and kind is int and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
            if kind is float and name != "kl_coef" and not 0 < value < math.inf:
                raise UserError(f"{name} must be above 0, got {value}")
        if self.best_of < 2:
            raise UserError(f"best_of must be at least 2, got {self.best_of}")
        if self.num_best_of_prompts > self.num_heldout_prompts:
            sizes = (
                f"num_best_of_prompts ({self.num_best_of_prompts}), num_heldout_prompts ({self.num_heldout_prompts})"
            )
            raise UserError(f"best-of-n uses the first held-out prompts, but of {sizes} the first is larger")
        if self.resume and self.overwrite:
            raise UserError("resume and overwrite exclude each other")
