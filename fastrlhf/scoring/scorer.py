"""What scores a response: a reward model, a Python function, or what is made of several such (combining.py)."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrlhf.data import Prompt
from fastrlhf.data.rows import REWARD_ARGUMENTS
from fastrlhf.data.template import check_same_vocabulary, load_tokenizer
from fastrlhf.generation.engine import Sample
from fastrlhf.models.loading import NO_HEAD, check_heads, heads_in
from fastrlhf.models.lora import hash_of, metadata_of
from fastrlhf.models.offload import awake
from fastrlhf.models.policy import ADAPTER, Policy, RewardModel
from fastrlhf.packing import Packed
from fastrlhf.runs import ranks
from fastrlhf.scoring.combining import Combined, combine, parse_reward, sources_of

RewardFunction = Callable[..., Sequence[float] | Tensor]


def load_function(source: str, option: str = "reward") -> Callable[..., Any]:
    """Returns the function named by "module:function"; the working folder is on the path, as for python -m.

    option: that gave it, for errors"""
    module_name, _, name = source.partition(":")
    if not module_name or module_name.startswith("."):
        raise ValueError(f"{option}: {source!r} names no module; write module:function")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and an import inside it failed
        raise ValueError(f"{option}: no module named {module_name!r} (working folder {Path.cwd()})") from None
    except AttributeError:
        raise ValueError(f"{option}: module {module_name!r} has no function {name!r}") from None
    if not callable(function):
        raise TypeError(f"{option}: {source} must be a function, got {type(function).__name__}")
    return function


class Scorer:
    """Scores responses: what a reward of combining.py's grammar makes of the scores of its sources.

    A function is called as f(prompts, responses, *, response_ids, finished, **columns) and returns N numbers: prompts
    and responses are texts (special tokens left out), response_ids the token ids of each response, finished whether it
    ended by itself; every other column of the prompt file arrives by name, None where a row lacks it. A function
    without **columns gets those of the keywords that it names. No column takes the place of these four arguments; a
    function that names response_ids or finished where the prompts have such a column is refused.

    columns: the names of the other columns of the prompt file; None: those of the prompts at hand
    models: each with its sources, which are several heads or the folder; functions: each with its source
    names: of the sources, reward models first
    base: a reward model that was trained as an adapter on its body is loaded as that

    Raises: ValueError or TypeError for a source that is none, a model without a trained head or with another
    vocabulary, and a function that needs what it will not get."""

    def __init__(
        self,
        reward: str | RewardFunction,
        tokenizer: Any,
        *,
        max_tokens: int,
        columns: Collection[str] | None = None,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        base: Policy | None = None,
    ) -> None:
        check_reward(reward)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.columns = columns
        self.models: list[tuple[RewardModel, list[str]]] = []
        self.functions: list[tuple[RewardFunction, str]] = []
        self.reward = parse_reward(reward) if isinstance(reward, str) else Combined("sum", ("function",), (1.0,))
        folders: dict[str, list[str]] = {}  # the heads of one model share its body
        for source in sources_of(self.reward):
            if callable(reward) or is_function(source):
                function = reward if callable(reward) else load_function(source)
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
        own = batch.share_of(*ranks.place())
        for model, sources in self.models:
            parts = batch.microbatches(self.max_tokens, share=ranks.place())
            with awake(model):
                scores = ranks.joined(torch.cat([model(part) for part in parts])[: len(own)])
            columns = scores.view(batch.num_sequences, -1).unbind(1)
            for source in sources:
                head = split_head(source)[1]
                terms.append(columns[model.heads.index(head) if head is not None else 0])
                _check_finite(terms[-1], prompts, f"the reward model {source}")
        prompts, samples = ranks.share(prompts), ranks.share(samples)
        calls = [ranks.joined(self._call(function, prompts, samples)) for function, _ in self.functions]
        return terms + [scores.to(batch.tokens.device) for scores in calls]

    def _call(self, function: RewardFunction, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> Tensor:
        if not samples:  # more processes than responses
            return torch.zeros(0)
        name = getattr(function, "__qualname__", repr(function))
        response_ids = [sample.response for sample in samples]
        names = self.columns
        if names is None:
            names = {name for prompt in prompts for name in prompt.columns}
        given: dict[str, list[Any]] = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        given |= {"response_ids": response_ids, "finished": [sample.finished for sample in samples]}
        returned = function(
            [prompt.text for prompt in prompts],
            self.tokenizer.batch_decode(response_ids, skip_special_tokens=True),
            **{name: given[name] for name in keywords_of(function, given)},
        )
        try:
            scores = torch.as_tensor(returned, dtype=torch.float32)
        except OverflowError:  # its digits may be too many to be shown
            raise ValueError(f"reward: {name} returned a number that is too large for a float") from None
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"reward: {name} must return {len(samples)} numbers, got {returned!r:.80}") from None
        if scores.shape != (len(samples),):
            raise ValueError(f"reward: {name} must return {len(samples)} scores, got {tuple(scores.shape)}")
        _check_finite(scores, prompts, name)
        return scores


def short_names(sources: Sequence[str]) -> list[str]:
    """Returns a name for each source: its last part, or all of it where last parts are the same."""
    names = [re.split("[/:]", source.rstrip("/"))[-1] for source in sources]
    return names if len(set(names)) == len(names) else list(sources)


def is_function(source: str) -> bool:
    """Whether a source names a function, and not the folder or hub id of a reward model.

    Raises: FileNotFoundError for what can be neither."""
    folder, head = split_head(source)
    if head == "":
        raise ValueError(f"reward: no head in {source!r}; write FOLDER#HEAD")
    if Path(folder).is_dir():
        return False
    if ":" not in source and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"reward: no folder {source!r}; a function is given as module:function")
    return ":" in source


def split_head(source: str) -> tuple[str, str | None]:
    """Returns folder and head of "FOLDER#HEAD"; a folder whose own name has a # is one."""
    folder, mark, head = source.rpartition("#")
    return (folder, head) if mark and not Path(source).is_dir() else (source, None)


def reward_folders(reward: Any) -> dict[str, list[str | None]]:
    """The reward models in a reward, each with the heads that are read; None: its only one."""
    folders: dict[str, list[str | None]] = {}
    for source in sources_of(parse_reward(reward)) if isinstance(reward, str) else ():
        if not is_function(source):
            folder, head = split_head(source)
            folders.setdefault(folder, []).append(head)
    return folders


def check_reward(reward: Any) -> None:
    """Refuses what a `Scorer` refuses, as far as the text and the configurations of its models tell: in no time.

    Raises: ValueError or FileNotFoundError for a text that is no reward, a folder that is none or without a trained
    head, and a head that the model has not."""
    for folder, heads in reward_folders(reward).items():
        names = heads_in(folder)
        if not names:
            raise ValueError(NO_HEAD.format(folder))
        for head in heads:
            check_heads(f"reward model: {folder}", names, head, ())


def load_reward_model(
    folder: str, sources: Sequence[str], tokenizer: Any, base: Policy | None, **options: Any
) -> RewardModel:
    """Returns the reward model in a folder, to score with; one that was trained as an adapter on the body of `base` as
    that.

    sources: FOLDER or FOLDER#HEAD; of several it has all its heads, of one that one

    Raises: as `load_scalar`, of which `check_reward` found most."""
    heads = [split_head(source)[1] for source in sources]
    check_same_vocabulary(tokenizer, load_tokenizer(folder), f"reward model {folder}")
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


def check_keywords(function: RewardFunction, columns: Collection[str]) -> None:
    """Raises TypeError for a function that needs another column of the prompts than these; ValueError for one that asks
    by name for what is both an argument of ours and a column."""
    taken = keywords_of(function, [*columns, *REWARD_ARGUMENTS])
    for name in set(REWARD_ARGUMENTS) & set(columns) & set(taken):
        if name in inspect.signature(function).parameters:
            told = getattr(function, "__qualname__", repr(function))
            raise ValueError(
                f"reward: {told} takes {name!r}, by which functions are told of the response, and the prompts have a "
                "column of that name: rename the column, or leave it out"
            )


def keywords_of(function: RewardFunction, available: Collection[str]) -> list[str]:
    """Returns which of the available keywords the function takes: all of them if it has **columns.

    Raises: TypeError when it cannot be called with two positional arguments and these."""
    name = getattr(function, "__qualname__", repr(function))
    # prompts and responses come first, without their names
    available = [keyword for keyword in dict.fromkeys(available) if keyword not in ("prompts", "responses")]
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a builtin
        return available
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    every = inspect.Parameter.VAR_KEYWORD in kinds
    taken = [keyword for keyword in available if every or keyword in signature.parameters]
    try:
        signature.bind(None, None, **dict.fromkeys(taken))
    except TypeError as error:
        expected = "(prompts, responses, *, response_ids, finished, **columns)"
        got = ", ".join(sorted(available))
        raise TypeError(f"reward: {name}{signature} must take {expected}, here with {got}: {error}") from None
    return taken


def _check_finite(scores: Tensor, prompts: Sequence[Prompt], name: str) -> None:
    for n, score in enumerate(scores.tolist()):
        if not math.isfinite(score):
            raise ValueError(f"reward: {name} gave {score} for response {n} to prompt {prompts[n].text[:80]!r}")
