"""What the further columns of a judged row may hold: margins, weights, probabilities, ratings, names of heads."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from fastrlhf.data.report import Reason, Rejected

Row = Mapping[str, Any]


def finished_of(row: Row, name: str) -> bool:
    value = row.get(name)
    if value is not None and not isinstance(value, bool):
        raise Rejected(Reason.BAD_FINISHED, f"{name} is {value!r}")
    return value is not False


def head_of(row: Row) -> str | None:
    head = row.get("head")
    return None if head is None else head_name(head)


def head_name(name: Any) -> str:
    if not isinstance(name, str) or not name or "#" in name:
        raise Rejected(Reason.BAD_HEAD, repr(name))
    return name


def margin_of(value: Any) -> float:
    if value is None:
        return 0.0
    if not _is_number(value):
        raise Rejected(Reason.BAD_MARGIN, repr(value))
    return float(value)


def weight_of(row: Row) -> float:
    weight = 1.0 if row.get("weight") is None else row["weight"]
    if not _is_number(weight) or weight < 0:
        raise Rejected(Reason.BAD_ROW_WEIGHT, repr(weight))
    return float(weight)


def probability_of(value: Any, name: str) -> float:
    if value is None:
        value = 1.0
    number = float(value) if isinstance(value, bool) or _is_number(value) else math.nan
    if not 0 <= number <= 1:
        raise Rejected(Reason.BAD_PROBABILITY, f"{name} is {value!r}")
    return number


def rating_of(value: Any, name: Any) -> float:
    if not _is_number(value):
        raise Rejected(Reason.BAD_RATING, f"{name} is {value!r}")
    return float(value)


def _is_number(value: Any) -> bool:
    """Whether it is finite, also as a float: a whole number of a JSON file may be beyond them."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
