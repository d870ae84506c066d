"""Settings of what is made by a model in place of people: labels, revisions, rounds of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastrlhf.settings.option import REQUIRED, option, rare, reads
from fastrlhf.settings.training import TEMPLATES, JobConfig, ScoringConfig

MAX_ROUNDS = 64


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig(JobConfig):
    """What all of them have."""

    output: str = option(REQUIRED, "folder of what is made", path="output", resume="free")
    temperature: float = option(1.0, "of sampling", above=0)
    max_prompt_tokens: int = option(512, "longer prompts are rejected", at_least=1)
    max_new_tokens: int = option(128, "length at which what is sampled is cut off", at_least=1)
    resume: bool = option(False, "continue what was begun in the output folder", resume="free")
    overwrite: bool = option(False, "delete an earlier run in the output folder", resume="free")

    def model_options(self) -> dict[str, Any]:
        """How models that are not trained are loaded.

        Raises: ValueError for cuda without a GPU."""
        half = self.autocast_dtype()
        return {"device": self.resolve_device(), "autocast": half, "dtype": half or torch.float32}


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(FeedbackConfig):
    """Who labels, and how it is asked."""

    judge: str | None = reads(None, "folder or hub id of a model, or http(s)://URL of an OpenAI-compatible server")
    judge_model: str | None = option(None, "name of the model on that server")
    judge_template: str = rare(
        "auto", "how it is asked: as template; with a server chat, or none for plain completions", choices=TEMPLATES
    )
    judge_template_kwargs: Mapping[str, Any] | None = rare(None, "what its template gets besides, as template_kwargs")
    judge_top: int = rare(20, "how many of the likeliest tokens the server is to list", at_least=1)
    judge_requests: int = rare(16, "requests under way at once", at_least=1, resume="free")
    judge_timeout: float = rare(600.0, "seconds for one request", above=0, resume="free")
    judge_key_file: str | None = rare(None, "file with the key of the server", path="file", resume="free")
    rubric: str | None = reads(None, "text file of what makes a response better; default: shipped")
    answers: tuple[str, ...] = rare(("A", "B"), "what the judge says for the response shown first, and second")
    min_mass: float = option(0.5, "pairs are rejected where these two together are less probable", between=(0, 1))
    tie_margin: float = option(0.0, "a preference so close to 1/2 is a tie, and dropped", between=(0, 0.5))
    judge_batch: int = option(64, "pairs asked about between two notes of how far it is", at_least=1)

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.judge_template_kwargs and self.judge_template == "none":
            yield "judge_template_kwargs are a chat template's, but judge_template is none: leave them out"
        bare = {answer.strip() for answer in self.answers}
        if len(self.answers) != 2 or bare != set(self.answers) or len(bare - {""}) != 2:
            yield f"answers must be two texts without white space around them, got {list(self.answers)}"
        if self.is_server() and self.judge_model is None:
            yield f"judge {self.judge} is a server: name a model that it serves by judge_model"
        if self.judge_model is not None and not self.is_server():
            yield "judge_model is the model of a server, whose URL is the judge: give that, or leave it out"

    def is_server(self) -> bool:
        """Whether the judge is a server."""
        return self.judge is not None and self.judge.startswith(("http://", "https://"))


@dataclass(frozen=True, kw_only=True)
class LabelConfig(JudgeConfig):
    """Preference pairs labelled by a judge from a rubric."""

    judge: str = reads(REQUIRED, "folder or hub id of a model, or http(s)://URL of an OpenAI-compatible server")
    data: str = reads(REQUIRED, "file of two responses a prompt, pairs to label anew, or prompts (policy)")
    policy: str | None = reads(None, "folder or hub id of what answers the prompts, twice each")
    limit: int | None = option(None, "use only so many rows of the data", at_least=1)
    rater: str | None = option(None, "name of the judge in the rows; default: its folder's or model's")


@dataclass(frozen=True, kw_only=True)
class ReviseConfig(FeedbackConfig):
    """Responses, criticised and revised by principles."""

    model: str = reads(REQUIRED, "folder or hub id of what responds, criticises and revises")
    data: str = reads(REQUIRED, "file with prompts")
    given: bool = option(False, "the data has first responses too (completion), to begin with")
    principles: str | None = reads(None, "YAML list of {name, critique, revision}; default: shipped")
    rounds: int = option(1, "critiques and revisions, each by a principle drawn", at_least=1, at_most=MAX_ROUNDS)
    pairs: bool = option(True, "also write pairs: the last revision over the first response")
    limit: int | None = option(None, "use only so many rows of the data", at_least=1)


@dataclass(frozen=True, kw_only=True)
class IterateConfig(ScoringConfig, JudgeConfig):
    """Rounds: labels, reward model, PPO."""

    model: str = reads(REQUIRED, "SFT model, folder or hub id: first policy, reference, start of reward models")
    data: str = reads(REQUIRED, "file with prompts")
    gold: str | None = reads(None, "module:function or URL that labels in place of a judge")
    comparisons: str | None = reads(None, "pairs to begin with, such as people's")
    rounds: int = option(3, "labels, reward model, PPO: so many times", at_least=1, at_most=MAX_ROUNDS)
    mix: str = option("all", "what a reward model learns from: all pairs, or the last round's", choices="all last")
    num_pairs: int = option(256, "prompts a round that get a pair, before ties are dropped", at_least=1)
    num_heldout: int = option(32, "prompts kept apart, to measure on; their pairs are never learned", at_least=1)
    reward_epochs: int = option(1, "passes over the pairs", at_least=1)
    reward_learning_rate: float = option(1e-5, "peak learning rate of the reward model", above=0)
    reward_batch_size: int = option(32, "pairs a step of the reward model", at_least=1)
    steps: int = option(20, "PPO steps a round", at_least=1)
    batch_size: int = option(64, "responses a PPO step", at_least=1)
    minibatches: int = option(4, "optimizer steps a pass over them", at_least=1)
    learning_rate: float = option(1e-5, "peak learning rate of the policy", above=0)
    kl_coef: float = option(0.05, "weight of the KL penalty to the SFT model", at_least=0)
    reward: str | None = option(None, "YAML file with further settings of fastrlhf reward", path="file")
    ppo: str | None = option(None, "YAML file with further settings of fastrlhf ppo", path="file")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if (self.judge is None) == (self.gold is None):
            yield "give judge or gold: who labels the pairs"

    def unused(self) -> Iterator[tuple[str, str]]:
        yield from super().unused()
        if self.mix == "last":
            yield "comparisons", ": with mix=last they are learned in no round"
