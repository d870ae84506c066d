"""Why rows are rejected, and what a file's rows came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Reason(StrEnum):
    """Every reason for which a row is rejected."""

    MISSING_COLUMN = "a column is missing or null"
    NOT_TEXT = "not text"
    NOT_UNICODE = "text with half a surrogate pair, which is no character"
    NOT_A_MESSAGE = "a message is no object with a role and text as content"
    UNKNOWN_KEY = "a message has a key that neither we nor the chat template read"
    TOOL_CALL = "a tool is called in a way that is not read"
    BAD_WEIGHT = "the weight of a message is neither 0 nor 1"
    BAD_MARGIN = "the margin is no finite number"
    BAD_FINISHED = "whether a response is finished is neither true nor false"
    BAD_ROW_WEIGHT = "the weight is no finite number of at least 0"
    BAD_PROBABILITY = "a label or preference is neither true nor false, nor a probability"
    BAD_RANKS = "the ranks are not a whole number for each response"
    TWO_RANKS = "one response has two ranks"
    BAD_HEAD = "the name of a head is no text, or has a #"
    TOO_FEW_RESPONSES = "fewer than two responses"
    UNKNOWN_ROLE = "unknown role"
    NOT_ALTERNATING = "roles do not alternate user, assistant, user, ..."
    ASSISTANT_NOT_LAST = "the last turn is not the assistant's"
    USER_NOT_LAST = "the last turn of the prompt is not the user's"
    NOT_ONE_ANSWER = "a response is not one assistant message"
    NO_PROMPT = "no prompt: neither a prompt column nor Human: and Assistant: turns (plain texts: --template none)"
    TEXT_BEFORE_TURNS = "text before the first Human: turn"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_RESPONSE = "empty response"
    EMPTY_TEXT = "empty text"
    PROMPTS_DIFFER = "the prompts of chosen and rejected differ"
    SAME = "chosen and rejected are the same"
    SAME_SAMPLES = "the policy gave the same response twice"
    CUT_OFF = "cut off before its end"
    NOT_TWO = "not two responses"
    LOW_MASS = "the judge says something else than one of the two answers"
    UNSEEN = "the server does not tell how likely an answer of the judge is"
    REFUSED = "the judge's server refuses the question"
    NOT_RENDERED = "the chat template does not render what a message has"
    SPELLS_CONTROL = "a text spells a control token, and the tokenizer cannot write it as text"
    TEMPLATE_REFUSES = "the chat template refuses the conversation"
    TEMPLATE_REWRITES = "the chat template rewrites earlier turns, so responses cannot be told apart"
    PROMPT_TOO_LONG = "prompt too long"
    TOO_LONG = "prompt and response too long"
    NO_RESPONSE_TOKEN = "no response token"
    END_INSIDE = "the token that ends a response stands inside one"
    BAD_LABEL = "the label is none of those that the format has"
    BAD_RATING = "a rating is no finite number"
    UNRANKED = "responses without a rank"
    ONE_RESPONSE = "one response, so there is nothing to compare"
    DELETED = "a deleted message, with those below it"
    TIE = "a tie (--ties keep takes it)"


# parts of other formats' files that are of no use by their nature, or by an option: counted, but no fault of the file
LEFT_OUT = (Reason.UNRANKED, Reason.ONE_RESPONSE, Reason.DELETED, Reason.TIE, Reason.SAME_SAMPLES)


class Rejected(Exception):
    """A row that cannot be used: the reason, and what was found."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass
class Report:
    """How many rows were read, the numbers (from 1) of those rejected for each reason, and what else is worth saying.

    details: what was found in the first row rejected for a reason"""

    path: str
    num_rows: int = 0
    rejected: dict[Reason, list[int]] = field(default_factory=dict)
    details: dict[Reason, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def num_rejected(self) -> int:
        return sum(len(rows) for rows in self.rejected.values())

    @property
    def num_faults(self) -> int:
        """How many rows were rejected for a fault, not left out by their nature."""
        return sum(len(rows) for reason, rows in self.rejected.items() if reason not in LEFT_OUT)

    @property
    def num_used(self) -> int:
        return self.num_rows - self.num_rejected

    def reject(self, number: int, reason: Reason, detail: str) -> None:
        """Counts a row."""
        self.rejected.setdefault(reason, []).append(number)
        if detail:
            self.details.setdefault(reason, f"row {number}: {detail}")

    def reasons(self) -> list[str]:
        """A line a reason: how many rows, and the first of them."""
        lines = []
        for reason, rows in sorted(self.rejected.items(), key=lambda item: -len(item[1])):
            example = self.details.get(reason, f"row {rows[0]}")
            what = "left out" if reason in LEFT_OUT else "rejected"
            lines.append(f"  {len(rows)} {what}: {reason} ({'first ' if len(rows) > 1 else ''}{example})")
        return lines

    def __str__(self) -> str:
        head = f"{self.path}: {self.num_used} of {self.num_rows} rows used"
        return "\n".join([head, *self.reasons(), *(f"  {note}" for note in self.notes)])
