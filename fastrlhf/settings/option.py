"""An option: a field of a settings class that carries its help and its own rules.

bounds     at_least, above, at_most, below, between=(low, high): of numbers; choices: of texts
path       input: what the run reads, and a resumed run finds the same; file: read too, not compared; output: written
object     what it may be in Python besides text (settings/objects.py): model, tokenizer, rows, reward
resume     same: as the run began; plan: may be changed, stays as planned where it is not given; free: how the run runs,
           not what it computes
rare       --help leaves it out, --help-all does not
positional on a command line the value may stand without --key, in the order of these fields

What a combination of options forbids is no rule of one: see `Settings.conflicts` and `Settings.unused`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from typing import Any, Literal

from fastrlhf.errors import UserError

REQUIRED = dataclasses.MISSING


def option(
    default: Any,
    help: str,
    *,
    choices: str | Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    between: tuple[float, float] | None = None,
    path: Literal["", "input", "file", "output"] = "",
    object: Literal["", "model", "tokenizer", "rows", "reward"] = "",
    resume: Literal["same", "plan", "free"] = "same",
    rare: bool = False,
    positional: bool = False,
) -> Any:
    """A field with a line of help and the rules above; a REQUIRED one must be given.

    choices: words, in the help where it has {}"""
    choices = tuple(choices.split() if isinstance(choices, str) else choices)
    if choices and "{}" in help:
        help = help.replace("{}", f"{', '.join(choices[:-1])} or {choices[-1]}")
    rules = {name: value for name, value in locals().items() if name != "default"}
    return dataclasses.field(default=default, metadata=rules)


rare = functools.partial(option, rare=True)
reads = functools.partial(option, path="input")


def check(field: dataclasses.Field[Any], value: Any) -> None:
    """Raises ValueError for a value that the option's choices or bounds exclude; None is none."""
    rules, name = field.metadata, field.name
    if value is None:
        return
    if rules["choices"] and value not in rules["choices"]:
        hint = did_you_mean(str(value), list(rules["choices"]))
        raise UserError(f"{name} must be one of {', '.join(rules['choices'])}, got {value!r}{hint}")
    for word, is_wrong in (
        ("at_least", lambda bound: value < bound),
        ("above", lambda bound: value <= bound),
        ("at_most", lambda bound: value > bound),
        ("below", lambda bound: value >= bound),
    ):
        if rules[word] is not None and is_wrong(rules[word]):
            raise UserError(f"{name} must be {word.replace('_', ' ')} {_shown(rules[word])}, got {value}")
    if rules["between"] and not rules["between"][0] <= value <= rules["between"][1]:
        raise UserError(f"{name} must be between {rules['between'][0]} and {rules['between'][1]}, got {value}")


def did_you_mean(name: str, known: list[str]) -> str:
    """A hint at the nearest known name, or nothing."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _shown(bound: float) -> str:
    is_power = isinstance(bound, int) and bound > 2**16 and bound & (bound - 1) == 0
    return f"2**{int(bound).bit_length() - 1} = {bound}" if is_power else f"{bound:g}"
