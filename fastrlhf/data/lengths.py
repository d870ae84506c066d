"""Characters are counted before tokens: tokenising takes some 200 bytes of memory a character."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastrlhf.data.report import Reason, Rejected

T = TypeVar("T")
FEW = 2**20  # characters that are always tokenised: 200 MB, and no row of so many is within any usual limit
MOST = 2**23  # characters of a text where there is no limit of tokens: a few MB, more than any model reads
NO_LIMIT = 2**31


def with_length_check(
    make: Callable[[Mapping[str, Any], tuple[str, ...]], T], tokenizer: Any, max_tokens: int
) -> Callable[[Mapping[str, Any], tuple[str, ...]], T]:
    """Returns `make`, which turns a row into tokens, for rows whose columns may fit alone; it rejects the others."""

    def made(row: Mapping[str, Any], used: tuple[str, ...]) -> T:
        for name in used:
            check_characters(row[name], tokenizer, max_tokens)
        return make(row, used)

    return made


def check_characters(value: Any, tokenizer: Any, max_tokens: int, reason: Reason = Reason.TOO_LONG) -> None:
    """Raises Rejected for a text, or messages, of more characters than max_tokens tokens can have: no token is longer
    than the longest entry of the vocabulary.

    (Unknown tokens, or a template that drops text, could make fewer tokens. Such a row is rejected all the same.)"""
    number = _characters(value)
    if number <= FEW:
        return
    if max_tokens >= NO_LIMIT:
        most, limit = MOST, "so many are not read"
    else:
        most, limit = max(FEW, max_tokens * _longest_entry(tokenizer)), f"{max_tokens} tokens allowed"
    if number > most:
        raise Rejected(reason, f"{number} characters, {limit}")


def _characters(value: Any) -> int:
    """How many characters a text has without the white space around it; messages have those of their contents, and of
    several texts the longest counts."""
    if isinstance(value, str):
        return len(value) if len(value) <= FEW else len(value.strip())
    if isinstance(value, Mapping):
        return _characters(value.get("content", value.get("text")))
    if isinstance(value, list):
        together = any(isinstance(each, Mapping) for each in value)
        return (sum if together else max)(map(_characters, value)) if value else 0
    return 0


def _longest_entry(tokenizer: Any) -> int:
    """Characters of the longest token."""
    vocabulary = (
        tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else ["a"]
    )  # of CharacterTokenizer each has one
    return max(map(len, vocabulary))
