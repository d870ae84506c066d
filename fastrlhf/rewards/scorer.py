"""What scores a response: a reward model, a Python function, or what is made of several such (combine.py)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrlhf.data import Prompt
from fastrlhf.data.objects import ModelSource, given
from fastrlhf.data.template import check_reads_ids_of
from fastrlhf.errors import UserError
from fastrlhf.generation.engine import Sample
from fastrlhf.models.loading import heads_in
from fastrlhf.models.lora import hash_of, metadata_of
from fastrlhf.models.offload import onloaded
from fastrlhf.models.policy import ADAPTER, Policy, RewardModel
from fastrlhf.packing import Packed
from fastrlhf.rewards.combine import Combined, combine, parse_reward, sources_of
from fastrlhf.rewards.functions import RewardFunction, call_function, check_keywords
from fastrlhf.rewards.named_functions import load_function, name_of
from fastrlhf.rewards.reward_server import RewardClient
from fastrlhf.rewards.sources import check_reward, is_model, is_server, short_names, split_head
from fastrlhf.runtime import distributed


class Scorer:
    """Scores responses: what a reward of combine.py's grammar makes of the scores of its sources.

    A function is called as f(prompts, responses, *, response_ids, finished, **columns) and returns N numbers: prompts
    and responses are texts (special tokens left out), response_ids the token ids of each response, finished whether it
    ended by itself; every other column of the prompt file arrives by name, None where a row lacks it. A function
    without **columns gets those of the keywords that it names. No column takes the place of these four arguments; a
    function that names response_ids or finished where the prompts have such a column is refused.

    A server (reward_server.py) gets the same, with all columns.

    columns: the names of the other columns of the prompt file; None: those of the prompts at hand
    models: each with its sources, which are several heads or the folder; functions: each with its source
    names: of the sources, reward models first
    base: a reward model that was trained as an adapter on its body is loaded as that
    reward_timeout: seconds for one call of a function, or one request to a server; None: no limit
    reward_batch: most responses in a request to a server, None: all; reward_key_file: file with its key

    Raises: ValueError or TypeError for a source that is none, a model without a trained head or with another
    vocabulary, and a function that needs what it will not get."""

    def __init__(
        self,
        reward: ModelSource | RewardFunction,
        tokenizer: Any,
        *,
        max_tokens: int,
        columns: Collection[str] | None = None,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        base: Policy | None = None,
        reward_timeout: float | None = None,
        reward_batch: int | None = None,
        reward_key_file: str | None = None,
    ) -> None:
        reward = given("reward", reward, "reward")
        check_reward(reward)
        self.timeout = reward_timeout
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.columns = columns
        self.models: list[tuple[RewardModel, list[str]]] = []
        self.functions: list[tuple[RewardFunction, str]] = []
        self.reward = parse_reward(reward) if isinstance(reward, str) else Combined("sum", ("function",), (1.0,))
        folders: dict[str, list[str]] = {}  # the heads of one model share its body
        for source in sources_of(self.reward):
            if callable(reward) or not is_model(source):
                function = reward if callable(reward) else self._function(source, reward_batch, reward_key_file)
                if columns is not None:
                    check_keywords(function, columns)
                self.functions.append((function, source))
            else:
                folders.setdefault(split_head(source)[0], []).append(source)
        for folder, heads in folders.items():
            dtype = autocast or torch.float32  # frozen, so it needs no fp32 weights
            model = load_reward_model(folder, heads, tokenizer, base, device=device, dtype=dtype)
            self.models.append((model, heads))
        self.sources = [source for _, heads in self.models for source in heads]
        self.sources += [source for _, source in self.functions]
        self.names = short_names(self.sources)

    def _function(self, source: str, batch: int | None, key_file: str | None) -> RewardFunction:
        if is_server(source):
            return RewardClient(
                source, columns=self.columns or (), timeout=self.timeout, batch=batch, key_file=key_file
            )
        return load_function(source)

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises TypeError for a function that needs another column of the prompts than these; ValueError for one that
        names an argument which is also a column."""
        for function, _ in self.functions:
            check_keywords(function, columns)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], samples: Sequence[Sample], batch: Packed) -> Tensor:
        """Returns the scores (N,) float32 of the responses. Raises: as `terms`."""
        return self.total(self.terms(prompts, samples, batch))

    def total(self, terms: Sequence[Tensor]) -> Tensor:
        """Returns the reward (N,) that is made of what `terms` returned."""
        return combine(self.reward, dict(zip(self.sources, terms, strict=True)))

    @torch.no_grad()
    def terms(self, prompts: Sequence[Prompt], samples: Sequence[Sample], batch: Packed) -> list[Tensor]:
        """Returns the scores (N,) float32 of each source, in the order of `names`. All processes of a run call this
        with the same arguments; in each of them models and functions get a share of the responses.

        Raises: ValueError when a function returns another number of scores, or for a score that is not finite."""
        terms: list[Tensor] = []
        own = batch.share_of(*distributed.rank_and_world_size())
        for model, sources in self.models:
            parts = batch.microbatches(self.max_tokens, share=distributed.rank_and_world_size())
            with onloaded(model):
                scores = distributed.all_gather_cat(torch.cat([model(part) for part in parts])[: len(own)])
            columns = scores.view(batch.num_sequences, -1).unbind(1)
            for source in sources:
                head = split_head(source)[1]
                terms.append(columns[model.heads.index(head) if head is not None else 0])
                _check_finite(terms[-1], prompts, f"the reward model {source}")
        prompts, samples = distributed.local_shard(prompts), distributed.local_shard(samples)
        calls = [
            distributed.all_gather_cat(self._of_function(function, prompts, samples)) for function, _ in self.functions
        ]
        return terms + [scores.to(batch.tokens.device) for scores in calls]

    def _of_function(self, function: RewardFunction, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> Tensor:
        if not samples:  # more processes than responses
            return torch.zeros(0)
        texts = self.tokenizer.batch_decode([sample.response for sample in samples], skip_special_tokens=True)
        scores = call_function(function, prompts, samples, texts, columns=self.columns, timeout=self.timeout)
        _check_finite(scores, prompts, name_of(function))
        return scores


def load_reward_model(
    folder: str, sources: Sequence[str], tokenizer: Any, base: Policy | None, **options: Any
) -> RewardModel:
    """Returns the reward model in a folder, to score with; one that was trained as an adapter on the body of `base` as
    that.

    sources: FOLDER or FOLDER#HEAD; of several it has all its heads, of one that one

    Raises: as `load_scalar`, of which `check_reward` found most."""
    heads = [split_head(source)[1] for source in sources]
    check_reads_ids_of(tokenizer, folder, "reward model")
    adapter = Path(folder) / ADAPTER
    if base is not None and heads == [None] and is_on(base, adapter):
        model: RewardModel = RewardModel.from_adapter(adapter, base).requires_grad_(False)
        return model
    if len(heads) == 1:
        options["head"] = heads[0]
    else:
        options["heads"] = heads_in(folder)
    model = RewardModel.from_pretrained(folder, freeze=True, **options)
    return model


def is_on(base: Policy, adapter: Path) -> bool:
    """Whether a folder holds an adapter of this body."""
    return adapter.is_dir() and metadata_of(adapter).get("base_hash") == hash_of(base.model)


def _check_finite(scores: Tensor, prompts: Sequence[Prompt], name: str) -> None:
    for n, score in enumerate(scores.tolist()):
        if not math.isfinite(score):
            raise UserError(f"reward: {name} gave {score} for response {n} to prompt {prompts[n].text[:80]!r}")
