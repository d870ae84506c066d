"""Reward functions: what they are called with, and what they must return."""

from __future__ import annotations

import copy
import functools
import inspect
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrlhf.data import Prompt
from fastrlhf.data.rows import REWARD_ARGUMENTS
from fastrlhf.errors import UserError, UserFunctionError, UserTypeError
from fastrlhf.generation.engine import Sample
from fastrlhf.rewards.named_functions import keywords_of, name_of
from fastrlhf.rewards.time_limit import within_reward_timeout

RewardFunction = Callable[..., Sequence[float] | Tensor]


def call_function(
    function: RewardFunction,
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    responses: list[str],
    *,
    columns: Collection[str] | None,
    timeout: float | None,
) -> Tensor:
    """Returns the scores that a function gives responses, float32 (N,). Its arguments are copies, and its result is
    copied, so it may change both.

    responses: as text; columns: names of those that it may get, None: all; timeout: in seconds

    Raises: TypeError or ValueError for what is no finite number for each response; TimeoutError; what it raises, and
    RuntimeError in the place of what would end the run in silence, such as SystemExit and StopIteration."""
    if columns is None:
        columns = {name for prompt in prompts for name in prompt.columns}
    response_ids = [list(sample.response) for sample in samples]
    given: dict[str, Any] = {name: [prompt.columns.get(name) for prompt in prompts] for name in columns}
    given |= {"response_ids": response_ids, "finished": [sample.finished for sample in samples]}
    # each row by itself: the responses to a prompt have its columns, and not one copy of them together
    taken = {name: [copy.deepcopy(value) for value in given[name]] for name in keywords_of(function, given)}
    name, texts = name_of(function), [prompt.text for prompt in prompts]
    call = functools.partial(function, texts, list(responses), **taken)
    is_limited = not getattr(function, "has_own_timeout", False)
    try:
        returned = within_reward_timeout(timeout if is_limited else None, name, len(samples), call)
    except BaseException as error:
        if isinstance(error, (Exception, KeyboardInterrupt)) and not isinstance(error, StopIteration):
            raise
        # SystemExit would end the process without a word, and StopIteration the loop as if all steps were done
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}({error}) in line {last.lineno} of {last.filename}".replace("()", "", 1)
        raise UserFunctionError(f"reward: {name} ended with {text}, without scores") from error
    try:
        # numbers, so that it does not matter how an array lies in memory, and complex ones are refused
        numbers = returned.tolist() if hasattr(returned, "tolist") else returned  # of torch, numpy, pandas
        scores = torch.as_tensor(numbers, dtype=torch.float32).detach().clone()
    except OverflowError:  # its digits may be too many to be shown
        raise UserError(f"reward: {name} returned a number that is too large for a float") from None
    except (TypeError, ValueError, RuntimeError):
        raise UserTypeError(f"reward: {name} must return {len(samples)} numbers, got {returned!r:.80}") from None
    if scores.shape != (len(samples),):
        got = " x ".join(map(str, scores.shape)) or "one number"
        raise UserError(f"reward: {name} must return {len(samples)} scores, got {got}")
    return scores


def check_keywords(function: RewardFunction, columns: Collection[str]) -> None:
    """Raises TypeError for a function that needs another column of the prompts than these; ValueError for one that asks
    by name for what is both an argument of ours and a column."""
    taken = keywords_of(function, [*columns, *REWARD_ARGUMENTS])
    for name in set(REWARD_ARGUMENTS) & set(columns) & set(taken):
        if name in inspect.signature(function).parameters:
            told = name_of(function)
            raise UserError(
                f"reward: {told} takes {name!r}, by which functions are told of the response, and the prompts have a "
                "column of that name: rename the column, or leave it out"
            )
