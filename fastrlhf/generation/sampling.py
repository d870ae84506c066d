"""What generation is asked for and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastrlhf.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: see `sample_tokens`; `greedy` takes the most likely one instead.

    max_new_tokens: a response ends after so many tokens if not by EOS
    min_new_tokens: EOS is not drawn before so many tokens, and neither `stop` nor repetition ends a response
    stop: strings that end a response, finished, with the token that completes one
    repeat_ngram, repeat_times: a response ends, unfinished, when its last tokens are some 1 to repeat_ngram tokens
    repeat_times times over; 0 and 0 for never"""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_new_tokens: int = 0
    greedy: bool = False
    stop: tuple[str, ...] = ()
    repeat_ngram: int = 0
    repeat_times: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"Sampling: max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            expected = f"min_new_tokens must be from 0 to max_new_tokens={self.max_new_tokens}"
            raise UserError(f"Sampling: {expected}, got {self.min_new_tokens}")
        if not 0 < self.temperature < float("inf"):
            advice = "; for the most likely token set greedy" if self.temperature == 0 else ""
            raise UserError(f"Sampling: temperature must be above 0 and finite, got {self.temperature}{advice}")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            expected = "top_k must be at least 0, top_p in (0, 1] and min_p in [0, 1]"
            raise UserError(f"Sampling: {expected}, got {self.top_k}, {self.top_p} and {self.min_p}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise UserError(f"Sampling: stop must be a tuple of strings, none empty, got {self.stop!r}")
        if (self.repeat_ngram, self.repeat_times) != (0, 0) and (self.repeat_ngram < 1 or self.repeat_times < 2):
            expected = "repeat_ngram must be at least 1 and repeat_times at least 2, or both 0"
            raise UserError(f"Sampling: {expected}, got {self.repeat_ngram} and {self.repeat_times}")


@dataclass(frozen=True)
class Sample:
    """A response, and two log-probabilities of each of its tokens.

    finished: it ended by EOS, which is its last token, or by a stop string, which its last token completes
    logprobs: given the tokens before, at the sampling temperature
    sampler_logprobs: what the draw followed, after top-k, top-p, min-p and min_new_tokens; 0 if greedy"""

    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    sampler_logprobs: list[float]
    finished: bool


class RolloutBackend(Protocol):
    """What draws responses from the policy: `Engine`, `ServerBackend` on another process, or a class of a user's
    (docs/python.md)."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> list[Sample]:
        """Returns a sample for each prompt, in their order.

        prompts: token ids of each prompt, none empty; several samples of one are asked for by repeating it
        seeds: a number for each prompt
        limits: most new tokens of each prompt, where that is less than sampling.max_new_tokens
        progress: called now and then with the number of tokens drawn since"""


def checked_limits(
    caller: str,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    limits: Sequence[int] | None,
) -> list[int]:
    """Returns the most new tokens of each prompt, after checking what any backend is asked."""
    budgets = [sampling.max_new_tokens] * len(prompts) if limits is None else list(limits)
    for name, given in (("seeds", seeds), ("limits", budgets)):
        if len(given) != len(prompts):
            raise UserError(f"{caller}: {name} must be one a prompt, {len(prompts)} in all, got {len(given)}")
    for i, (prompt, seed, budget) in enumerate(zip(prompts, seeds, budgets, strict=True)):
        if not prompt:
            raise UserError(f"{caller}: prompt {i} is empty")
        if not -(2**63) <= seed < 2**63:
            raise UserError(f"{caller}: seeds must fit 64 bits, got {seed} for prompt {i}")
        if not 1 <= budget <= sampling.max_new_tokens:
            expected = f"limits must be from 1 to max_new_tokens={sampling.max_new_tokens}"
            raise UserError(f"{caller}: {expected}, got {budget} for prompt {i}")
    return budgets
