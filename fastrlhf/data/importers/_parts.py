"""What several formats have: numbers, and pairs with their ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastrlhf.data.report import Reason, Rejected
from fastrlhf.settings.data import DataConvertConfig


def number_of(value: Any, name: str) -> int | float:
    """A finite number, also one written as text. Raises Rejected for anything else."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise Rejected(Reason.BAD_RATING, f"{name} is {value!r}")
    return int(number) if number == int(number) else number


def pair(
    prompt: Any, responses: Sequence[Any], sign: float, config: DataConvertConfig, **others: Any
) -> dict[str, Any]:
    """A pair of two responses: the second is chosen where sign > 0, the first where sign < 0; 0 is a tie.

    A tie is kept as preference 0.5, the first response as the chosen one, or raises Rejected if the settings say so.
    others: further columns; one of the form (first, second) named `x` becomes chosen_x and rejected_x"""
    if sign == 0 and config.ties == "reject":
        raise Rejected(Reason.TIE)
    order = (1, 0) if sign > 0 else (0, 1)
    row = {"prompt": prompt, "chosen": responses[order[0]], "rejected": responses[order[1]]}
    if sign == 0:
        row["preference"] = 0.5
    for name, value in others.items():
        if isinstance(value, tuple):
            row |= {f"{side}_{name}": value[n] for side, n in zip(("chosen", "rejected"), order, strict=True)}
        else:
            row[name] = value
    return row
