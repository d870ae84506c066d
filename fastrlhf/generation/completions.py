"""Checks the completion that a server returns, and makes a `Sample` of it."""

from __future__ import annotations

import math
from typing import Any

from fastrlhf.errors import UserError
from fastrlhf.generation.sampling import Sample
from fastrlhf.generation.server import check_logprob
from fastrlhf.runtime.http import shown

REASONS = ("stop", "length", "repetition")  # finish_reason
LOWEST = -3.4e38  # log-probability that float32 holds


def read_sample(request: dict[str, Any], answer: dict[str, Any], vocab_size: int | None) -> Sample:
    """Returns the sample in the answer to a request of `ServerBackend`.

    Raises: ValueError if the answer does not fit the request, saying what is wrong."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise UserError(f"the answer is not a completion with one choice: {shown(str(answer))}")
    choice, reason = choices[0], choices[0].get("finish_reason")
    read = choice.get("prompt_token_ids")
    if read is not None and read != request["prompt"]:
        text = f"the server read other tokens than the {len(request['prompt'])} of the prompt"
        raise UserError(f"{text}: {shown(str(read), 80)}")
    tokens = _tokens(choice.get("token_ids"), request["max_tokens"], vocab_size)
    if not isinstance(reason, str) or reason not in REASONS:
        raise UserError(f"the response ended with finish_reason {shown(repr(reason), 80)}")
    finished = _finished(tokens, reason, request)
    logprobs = _logprobs(choice.get("logprobs"), len(tokens))
    sampler_logprobs = [0.0] * len(tokens) if request["temperature"] == 0 else list(logprobs)
    return Sample(list(request["prompt"]), tokens, logprobs, sampler_logprobs, finished)


def _tokens(tokens: Any, limit: int, vocab_size: int | None) -> list[int]:
    if tokens is None:
        raise UserError("the answer has no token_ids; the server must know return_token_ids, as newer vLLMs do")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"token_ids must be a list of at least one, got {shown(repr(tokens), 80)}")
    bound = math.inf if vocab_size is None else vocab_size
    for token in tokens:
        if type(token) is not int or not 0 <= token < bound:
            size = "at least 0" if vocab_size is None else f"from 0 to {vocab_size - 1}"
            raise UserError(f"token_ids must be whole numbers {size}, got {shown(repr(token), 80)}")
    if len(tokens) > limit:
        raise UserError(f"the response has {len(tokens)} tokens, {limit} were asked for")
    return tokens


def _finished(tokens: list[int], reason: str, request: dict[str, Any]) -> bool:
    """Whether a response ended by a token or a string that ends it."""
    ends = set(request["stop_token_ids"])
    if not ends.isdisjoint(tokens[:-1]):
        raise UserError("the response goes on after a token of stop_token_ids")
    by_token = tokens[-1] in ends
    if reason == "stop" and not by_token and not request["stop"]:
        raise UserError(f"finish_reason is stop, but the last token {tokens[-1]} is not of stop_token_ids")
    if reason == "repetition" and "repetition_detection" not in request:
        raise UserError("the response was cut for a repetition, which was not asked for")
    if reason == "length" and not by_token and len(tokens) < request["max_tokens"]:
        counts = f"after {len(tokens)} tokens, {request['max_tokens']} were asked for"
        raise UserError(f"the response was cut {counts} (is --max-model-len too small?)")
    return reason == "stop" or by_token  # at the limit older vLLMs say length


def _logprobs(told: Any, count: int) -> list[float]:
    values = told.get("token_logprobs") if isinstance(told, dict) else None
    if not isinstance(values, list) or len(values) != count:
        raise UserError(f"the answer does not have a log-probability for each of its {count} tokens")
    logprobs = []
    for value in values:
        logprobs.append(check_logprob(value))
        if logprobs[-1] < LOWEST:
            raise UserError(f"a token that was drawn has the log-probability {logprobs[-1]:g}")
    return logprobs
