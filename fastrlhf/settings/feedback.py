"""Settings of what is made by a model in place of people: labels, revisions, rounds of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastrlhf.errors import UserError
from fastrlhf.settings.scoring import ScoringConfig
from fastrlhf.settings.training import REQUIRED, JobConfig, above, at_least, choose, option, rare, within

MAX_ROUNDS = 64


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig(JobConfig):
    """What all of them have."""

    output: str = option(REQUIRED, "folder of what is made")
    temperature: float = option(1.0, "of sampling")
    max_prompt_tokens: int = option(512, "longer prompts are rejected")
    max_new_tokens: int = option(128, "length at which what is sampled is cut off")
    resume: bool = option(False, "continue what was begun in the output folder")
    overwrite: bool = option(False, "delete an earlier run in the output folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        above(self, 0, "temperature")
        at_least(self, 1, "max_prompt_tokens", "max_new_tokens")
        if self.resume and self.overwrite:
            raise UserError("resume and overwrite exclude each other")

    def model_options(self) -> dict[str, Any]:
        """How models that are not trained are loaded.

        Raises: ValueError for cuda without a GPU."""
        half = self.autocast_dtype()
        return {"device": self.resolve_device(), "autocast": half, "dtype": half or torch.float32}


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(FeedbackConfig):
    """Who labels, and how it is asked."""

    judge: str | None = option(None, "folder or hub id of a model, or http(s)://URL of an OpenAI-compatible server")
    judge_model: str | None = option(None, "name of the model on that server")
    judge_template: str = rare(
        "auto", "how it is asked: as template; with a server chat, or none for plain completions"
    )
    judge_template_kwargs: Mapping[str, Any] | None = rare(None, "what its template gets besides, as template_kwargs")
    judge_top: int = rare(20, "how many of the likeliest tokens the server is to list")
    judge_requests: int = rare(16, "requests under way at once")
    judge_timeout: float = rare(600.0, "seconds for one request")
    judge_key_file: str | None = rare(None, "file with the key of the server")
    rubric: str | None = option(None, "text file of what makes a response better; default: shipped")
    answers: tuple[str, ...] = rare(("A", "B"), "what the judge says for the response shown first, and second")
    min_mass: float = option(0.5, "pairs are rejected where these two are less probable than this together")
    tie_margin: float = option(0.0, "a preference so close to 1/2 is a tie, and dropped")
    judge_batch: int = option(64, "pairs asked about between two notes of how far it is")

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(self, "judge_template", ("auto", "chat", "none"))
        if self.judge_template_kwargs and self.judge_template == "none":
            raise UserError("judge_template_kwargs are a chat template's, but judge_template is none: leave them out")
        above(self, 0, "judge_timeout")
        at_least(self, 1, "judge_requests", "judge_top", "judge_batch")
        within(self, 0, 1, "min_mass")
        within(self, 0, 0.5, "tie_margin")
        bare = {answer.strip() for answer in self.answers}
        if len(self.answers) != 2 or bare != set(self.answers) or len(bare - {""}) != 2:
            raise UserError(f"answers must be two texts without white space around them, got {list(self.answers)}")
        if self.is_server() != (self.judge_model is not None):
            if self.is_server():
                raise UserError(f"judge {self.judge} is a server: name a model that it serves by judge_model")
            raise UserError("judge_model is the model of a server, whose URL is the judge: give that, or leave it out")

    def is_server(self) -> bool:
        """Whether the judge is a server."""
        return self.judge is not None and self.judge.startswith(("http://", "https://"))


@dataclass(frozen=True, kw_only=True)
class LabelConfig(JudgeConfig):
    """Preference pairs labelled by a judge from a rubric."""

    judge: str = option(REQUIRED, "folder or hub id of a model, or http(s)://URL of an OpenAI-compatible server")
    data: str = option(REQUIRED, "file of two responses a prompt, pairs to label anew, or prompts (policy)")
    policy: str | None = option(None, "folder or hub id of what answers the prompts, twice each")
    limit: int | None = option(None, "use only so many rows of the data")
    rater: str | None = option(None, "name of the judge in the rows; default: its folder's or model's")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "limit")


@dataclass(frozen=True, kw_only=True)
class ReviseConfig(FeedbackConfig):
    """Responses, criticised and revised by principles."""

    model: str = option(REQUIRED, "folder or hub id of what responds, criticises and revises")
    data: str = option(REQUIRED, "file with prompts")
    given: bool = option(False, "the data has first responses too (completion), to begin with")
    principles: str | None = option(None, "YAML list of {name, critique, revision}; default: shipped")
    rounds: int = option(1, "critiques and revisions of a response, each by a principle that is drawn")
    pairs: bool = option(True, "also write pairs: the last revision over the first response")
    limit: int | None = option(None, "use only so many rows of the data")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "rounds", "limit")
        if self.rounds > MAX_ROUNDS:
            raise UserError(f"rounds must be at most {MAX_ROUNDS}, got {self.rounds}")


@dataclass(frozen=True, kw_only=True)
class IterateConfig(ScoringConfig, JudgeConfig):
    """Rounds: labels, reward model, PPO."""

    model: str = option(REQUIRED, "SFT model, folder or hub id: first policy, reference, start of reward models")
    data: str = option(REQUIRED, "file with prompts")
    gold: str | None = option(None, "module:function or URL that labels in place of a judge")
    comparisons: str | None = option(None, "pairs to begin with, such as people's")
    rounds: int = option(3, "labels, reward model, PPO: so many times")
    mix: str = option("all", "what a reward model learns from: all pairs so far, or those of the last round")
    num_pairs: int = option(256, "prompts a round that get a pair, before ties are dropped")
    num_heldout: int = option(32, "prompts that are kept apart, to measure on; their pairs are never learned")
    reward_epochs: int = option(1, "passes over the pairs")
    reward_learning_rate: float = option(1e-5, "peak learning rate of the reward model")
    reward_batch_size: int = option(32, "pairs a step of the reward model")
    steps: int = option(20, "PPO steps a round")
    batch_size: int = option(64, "responses a PPO step")
    minibatches: int = option(4, "optimizer steps a pass over them")
    learning_rate: float = option(1e-5, "peak learning rate of the policy")
    kl_coef: float = option(0.05, "weight of the KL penalty to the SFT model")
    reward: str | None = option(None, "YAML file with further settings of fastrlhf reward")
    ppo: str | None = option(None, "YAML file with further settings of fastrlhf ppo")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.judge is None) == (self.gold is None):
            raise UserError("give judge or gold: who labels the pairs")
        choose(self, "mix", ("all", "last"))
        at_least(self, 1, "rounds", "num_pairs", "num_heldout")
        if self.rounds > MAX_ROUNDS:
            raise UserError(f"rounds must be at most {MAX_ROUNDS}, got {self.rounds}")
        if self.mix == "last" and self.comparisons is not None:
            raise UserError("comparisons: with mix=last they are learned in no round")
