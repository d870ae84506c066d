"""What a judge thinks of two responses, read from the log-probabilities of its two possible answers.

A judge is asked a question that ends where its answer begins. With p_1 and p_2 the probabilities that the next token is
the first or the second answer ("A" or "B", in each form that the vocabulary has, such as with a space before it),

    P(the response shown first is better) = p_1 / (p_1 + p_2),    mass = p_1 + p_2

Nothing is sampled. A judge prefers a place, first or second, whatever stands there; so each pair is asked about in both
orders and P averaged.

Source: Lee et al., arXiv 2309.00267, section 2.1 and appendix B (soft labels, both orders); Bai et al., arXiv
2212.08073, section 4.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastrlhf.data import Reason, Rejected
from fastrlhf.data.controls import Quoted
from fastrlhf.errors import UserError

PLACEHOLDERS = ("prompt", "response_1", "response_2")


@dataclass(frozen=True)
class Reply:
    """Log-probabilities that a judge's next token is the first or the second answer; -inf: none worth a number.

    other: the likeliest token that is neither, as text; empty where it is not known"""

    first: float
    second: float
    other: str = ""

    @property
    def mass(self) -> float:
        """Probability that the next token is either answer."""
        return math.exp(self.first) + math.exp(self.second)

    @property
    def preference(self) -> float:
        """P(the response shown first is better)."""
        if self.first == self.second:
            return 0.5
        return 1 / (1 + math.exp(min(self.second - self.first, 700.0)))


Both = tuple[Reply, Reply]  # to the same pair in its two orders


class Judge(Protocol):
    """What is asked: `LocalJudge` or `ServerJudge` (judges.py)."""

    def ask(self, questions: Sequence[tuple[str, str]], progress: Callable[[int], object]) -> list[Both | Rejected]:
        """Returns the replies to the two questions about each pair, or why there are none.

        progress: called with the number of pairs done since"""


@dataclass(frozen=True)
class Verdict:
    """What a judge said of a pair of responses when asked in both orders.

    orders: P(the pair's first response is better), when it is shown first and when it is shown second
    masses: probability that the reply was one of the two answers, likewise"""

    orders: tuple[float, float]
    masses: tuple[float, float]

    @property
    def preference(self) -> float:
        """P(the pair's first response is better), the mean over the orders."""
        return sum(self.orders) / 2

    @property
    def order_decides(self) -> bool:
        """Whether each order has its own winner."""
        first, second = self.orders
        return (first - 0.5) * (second - 0.5) < 0


class Question:
    """Writes questions from a rubric.

    text: of the whole question, with {prompt}, {response_1} and {response_2} in it, and {rubric}, {answer_1} and
    {answer_2} where wanted; answers: what the judge is to say for the response shown first, and second

    Raises: ValueError for a text without one of the first three."""

    def __init__(self, text: str, rubric: str, answers: Sequence[str]) -> None:
        missing = [name for name in PLACEHOLDERS if f"{{{name}}}" not in text]
        if missing:
            raise UserError(f"rubric: a question needs {{{missing[0]}}} in it")
        self.text = text
        self.fixed = {"rubric": rubric, "answer_1": answers[0], "answer_2": answers[1]}

    def __call__(self, prompt: str, first: str, second: str) -> str:
        """The question about two responses to a prompt, in this order."""
        values = {"prompt": prompt, "response_1": first, "response_2": second}
        # in one pass, so that braces in a response stay what they are, and so do words that look like control tokens
        parts = re.split(r"\{(\w+)\}", self.text)
        filled = [(parts[0], False)]
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            filled += [(values.get(name, self.fixed.get(name, f"{{{name}}}")), name in values), (text, False)]
        return Quoted.of(*filled)


def judge_pairs(
    judge: Judge,
    question: Question,
    pairs: Sequence[tuple[str, str, str]],
    *,
    min_mass: float,
    progress: Callable[[int], object],
) -> list[Verdict | Rejected]:
    """Returns the verdict on each (prompt, response, response), or why there is none.

    min_mass: least probability, in each order, that the judge's next token is one of the two answers"""
    questions = [(question(prompt, a, b), question(prompt, b, a)) for prompt, a, b in pairs]
    return [_verdict(replies, min_mass) for replies in judge.ask(questions, progress)]


def _verdict(replies: Both | Rejected, min_mass: float) -> Verdict | Rejected:
    if isinstance(replies, Rejected):
        return replies
    first, second = replies
    masses = first.mass, second.mass
    if not all(mass >= min_mass for mass in masses):  # NaN too
        other = min(replies, key=lambda reply: reply.mass).other
        instead = f"; its likeliest other token is {other!r}" if other else ""
        return Rejected(Reason.LOW_MASS, f"{min(masses):.3g}, less than min_mass = {min_mass:g}{instead}")
    return Verdict((first.preference, 1 - second.preference), masses)
