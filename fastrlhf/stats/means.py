"""A mean and how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """The mean of `num` independent values and its standard error, sd / sqrt(num); the sd has num - 1 in its
    denominator, so the error of fewer than two values is unknown: NaN, and null in files."""

    mean: float
    error: float
    num: int

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        """The mean of (N,) values."""
        values = values.detach().double().flatten()
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(values.mean().item(), error, len(values))

    def named(self, name: str) -> dict[str, float]:
        """NAME and NAME_error, as the rows of results have them."""
        return {name: self.mean, f"{name}_error": self.error}

    @property
    def z_score(self) -> float:
        """How many standard errors the mean is away from 0; infinite where all values are the same."""
        return in_errors(self.mean, self.error)

    def __str__(self) -> str:
        return with_error(self.mean, self.error)


def in_errors(value: float, error: float | None) -> float:
    """Returns value / error: 0 for 0 / 0, infinite for another value without an error, NaN where it is unknown."""
    if error is None:
        return math.nan
    return value / error if error else math.copysign(math.inf, value) if value else 0.0


def describe_z_score(value: float, error: float | None) -> str:
    """How many standard errors the mean over some prompts is away from 0, as words."""
    if error is None or math.isnan(error):
        return "one prompt, so its error is unknown"
    return f"{value / error:.1f} standard errors" if error else "the same on every prompt"


def with_error(value: float, error: float | None, style: str = ".3f") -> str:
    """A value with its standard error as text; an error that is unknown (NaN, or None as files have it) is a question
    mark. style: format of the value"""
    known = error is not None and math.isfinite(error)
    return f"{value:{style}} ± {error:.3f}" if known else f"{value:{style}} ± ?"
