"""One reward of several scores: weighted sums, ensembles, a gate, scores in standard units.

REWARD  = TERM,TERM,...                      their sum
TERM    = VALUE  or  VALUE=WEIGHT            VALUE times the weight; 1 where there is none
VALUE   = SOURCE                             FOLDER, FOLDER#HEAD, module:function or http(s)://URL
        | mean(VALUE|VALUE|...)              the mean of an ensemble
        | min(VALUE|VALUE|...)               its worst case
        | lcb(VALUE|VALUE|...;LAMBDA)        its mean - LAMBDA standard deviations
        | gate(A|B;THRESHOLD)                A where B is at least THRESHOLD, else B
        | gate(A|B;THRESHOLD;PENALTY)        A where B is at least THRESHOLD, else PENALTY
        | standard(VALUE;MEAN;DEVIATION)     (VALUE - MEAN) / DEVIATION

A source holds none of , | ; and no parenthesis without its partner.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrlhf.data.objects import GivenObject
from fastrlhf.errors import UserError

QUERY = re.compile(r"https?://[^,|;()]*\?[^,|;()]*", re.IGNORECASE)  # of a URL


def lower_bound(scores: Tensor, strength: float) -> Tensor:
    """Returns mean - strength * standard deviation (N,) over the models of scores (K, N).

    The deviation has K in its denominator; one is measured of the K models at hand, not of all that could be trained.

    Source: Coste et al., arXiv 2310.02743, section 4.2, which takes the variance off; the deviation is in the units of
    the scores, so a strength means the same at any scale of theirs."""
    return scores.mean(0) - strength * scores.std(0, correction=0)


def gate(scores: Tensor, threshold: float, penalty: float | None = None) -> Tensor:
    """Returns A (N,) of scores (A, B) (2, N) where B >= threshold; elsewhere B, or the penalty.

    Source: Touvron et al., arXiv 2307.09288, section 3.4.1: B, safety, where it is below 0.15, else A, helpfulness."""
    first, second = scores
    otherwise = second if penalty is None else torch.full_like(second, penalty)
    return torch.where(second >= threshold, first, otherwise)


@dataclass(frozen=True)
class Form:
    """A way to make one value of others.

    usage: as it is written; compute: (K, N) scores and the numbers to (N,); parts, numbers: least and most of them"""

    usage: str
    compute: Callable[..., Tensor]
    parts: tuple[int, float]
    numbers: tuple[int, int]


FORMS = {
    "mean": Form("mean(A|B|...)", lambda scores: scores.mean(0), (2, math.inf), (0, 0)),
    "min": Form("min(A|B|...)", lambda scores: scores.amin(0), (2, math.inf), (0, 0)),
    "lcb": Form("lcb(A|B|...;LAMBDA)", lower_bound, (2, math.inf), (1, 1)),
    "gate": Form("gate(A|B;THRESHOLD) or gate(A|B;THRESHOLD;PENALTY)", gate, (2, 2), (1, 2)),
    "standard": Form("standard(A;MEAN;DEVIATION)", lambda scores, mean, sd: (scores[0] - mean) / sd, (1, 1), (2, 2)),
}


@dataclass(frozen=True)
class Combined:
    """A value made of others by a form of FORMS, or by "sum" with a number, the weight, for each part."""

    form: str
    parts: tuple[Value, ...]
    numbers: tuple[float, ...]


Value = str | Combined


def combine(value: Value, scores: Mapping[str, Tensor]) -> Tensor:
    """Evaluates a reward expression: returns the combined scores (N,) of N responses. scores: (N,) of each source."""
    if isinstance(value, str):
        return scores[value]
    parts = [combine(part, scores) for part in value.parts]
    if value.form == "sum":
        return torch.stack([weight * part for weight, part in zip(value.numbers, parts, strict=True)]).sum(0)
    return FORMS[value.form].compute(torch.stack(parts), *value.numbers)


def sources_of(value: Value) -> Iterator[str]:
    """The sources in a value, each once, in the order in which they are written."""
    if isinstance(value, str):
        yield value
    else:
        yield from dict.fromkeys(source for part in value.parts for source in sources_of(part))


def parse_reward(text: str) -> Combined:
    """Returns the sum that a text of the grammar above stands for.

    Raises: ValueError for a text that is none, naming the part."""
    if isinstance(text, GivenObject):
        return Combined("sum", (text,), (1.0,))
    if not text:
        raise UserError("reward: give a reward model folder, module:function or http(s)://URL")
    if query := QUERY.search(text):
        raise UserError(f"reward: {query[0]!r} has a ?, after which an = would be read as a weight; give a path alone")
    terms = [_weighted(term.strip()) for term in _split(text, ",")]
    return Combined("sum", tuple(value for value, _ in terms), tuple(weight for _, weight in terms))


def _weighted(term: str) -> tuple[Value, float]:
    *parts, weight = _split(term, "=")
    if not parts:
        return _value(term, term), 1.0
    number = _number(weight)
    if number is None:
        raise UserError(f"reward: the weight in {term!r} is no number; write SOURCE=WEIGHT")
    return _value("=".join(parts), term), number


def _value(text: str, term: str) -> Value:
    """The value that a text stands for. term: that it is part of, for errors"""
    text = text.strip()
    name, opened, rest = text.partition("(")
    if not (opened and rest.endswith(")") and name.isidentifier()):
        if not text:
            raise UserError(f"reward: no source in {term!r}; write SOURCE=WEIGHT")
        if len(_split(text, "|")) + len(_split(text, ";")) > 2:
            raise UserError(f"reward: | and ; in {term!r} stand outside of parentheses; write mean(A|B)")
        return text
    if name not in FORMS:
        raise UserError(f"reward: no {name}(...) in {term!r}; there are {', '.join(FORMS)}")
    form = FORMS[name]
    inside, *numbers = _split(rest[:-1], ";")
    parts, values = _split(inside, "|"), [_number(number) for number in numbers]
    if not form.parts[0] <= len(parts) <= form.parts[1] or not form.numbers[0] <= len(values) <= form.numbers[1]:
        raise UserError(f"reward: {text!r} must be {form.usage}")
    given = tuple(value for value in values if value is not None)
    if len(given) < len(values):
        raise UserError(f"reward: {text!r} must be {form.usage} with finite numbers")
    if name == "standard" and given[1] <= 0:
        raise UserError(f"reward: the deviation in {text!r} must be above 0")
    if name == "lcb" and given[0] < 0:
        raise UserError(f"reward: LAMBDA in {text!r} must be at least 0")
    for part in parts:
        *before, after = _split(part, "=")
        if before and _number(after) is not None:
            raise UserError(f"reward: a weight stands after a term, and not inside {text!r}")
    return Combined(name, tuple(_value(part, term) for part in parts), given)


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that are in no parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == separator and not depth:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise UserError(f"reward: a parenthesis in {text!r} lacks its partner")
    return parts


def _number(text: str) -> float | None:
    """The finite number that a text is, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
