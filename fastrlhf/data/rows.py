"""What loaders make of rows: prompts, demonstrations, and the usable rows of a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastrlhf.data.report import Report

T = TypeVar("T")
# what a reward function is told of responses, never a column of prompts
REWARD_ARGUMENTS = ("prompts", "responses", "response_ids", "finished")


@dataclass(frozen=True)
class Prompt:
    """tokens up to where the response starts; the prompt as text; the other columns of its row.

    turns: the prompt as its row has it, text or messages"""

    tokens: list[int]
    text: str
    columns: dict[str, Any]
    turns: Any = None


@dataclass(frozen=True)
class Demonstration:
    """tokens of a conversation; response_mask is True for those that the model should learn to write.

    Behind the end of the last answer there may be what the chat template writes there, such as a line feed."""

    tokens: list[int]
    response_mask: list[bool]

    @property
    def answered(self) -> list[int]:
        """The tokens up to the end of the last answer that is learned, where a reward model reads its score."""
        return self.tokens[: len(self.tokens) - self.response_mask[::-1].index(True)]


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """The usable rows of a file, and the report on all of them."""

    rows: list[T]
    report: Report
