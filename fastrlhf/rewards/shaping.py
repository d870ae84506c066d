"""Score shaping: scores are normalised and clipped; responses that are cut off or too long get less."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RunningMoments:
    """Number, mean and sum of squared deviations of all scores so far: part of a checkpoint."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, scores: Tensor) -> None:
        """Takes up scores (N,). Source: Chan, Golub and LeVeque (1983), equation 2.1."""
        values, num = scores.double(), scores.numel()
        mean, total = values.mean().item(), self.count + num
        step = mean - self.mean
        self.squares += (values - mean).square().sum().item() + step**2 * self.count * num / total
        self.mean += step * num / total
        self.count = total

    @property
    def deviation(self) -> float:
        """The standard deviation, biased; 1 while all scores are equal."""
        return math.sqrt(self.squares / self.count) if self.squares > 0 else 1.0


def shape_scores(
    scores: Tensor,
    lengths: Tensor,
    finished: Tensor,
    *,
    moments: RunningMoments,
    score_norm: str = "none",
    score_clip: float | None = None,
    missing_eos: tuple[str, float] = ("none", 0.0),
    min_response_tokens: int = 0,
    length_penalty: float = 0.0,
    overlong_tokens: int = 0,
    overlong_penalty: float = 1.0,
    max_new_tokens: int,
) -> Tensor:
    """Returns the shaped scores (N,) float32. In this order:

    score_norm: "scale" divides by the deviation of `moments`, which have taken up the scores; "whiten" takes their mean
        off first
    score_clip c: min(max(score, -c), c)
    missing_eos: `apply_missing_eos` to responses that are unfinished or shorter than min_response_tokens
    length_penalty: taken off a response token
    overlong_tokens m: overlong_penalty clip((length - (max_new_tokens - m)) / m, 0, 1) is taken off

    scores: (N,) float32; lengths: (N,) int, response tokens; finished: (N,) bool, False where cut off

    Raises: ValueError for another score_norm or rule of missing_eos.
    Source: Yu et al., arXiv 2503.14476, equation 13 (overlong)."""
    if score_norm not in ("none", "scale", "whiten"):
        raise ValueError(f"shape_scores: score_norm must be none, scale or whiten, got {score_norm!r}")
    if score_norm == "whiten":
        scores = scores - moments.mean
    if score_norm != "none":
        scores = scores / moments.deviation
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    scores = apply_missing_eos(scores, finished & (lengths >= min_response_tokens), *missing_eos)
    scores = scores - length_penalty * lengths
    if overlong_tokens:
        excess = lengths - (max_new_tokens - overlong_tokens)
        scores = scores - overlong_penalty * (excess / overlong_tokens).clamp(0, 1)
    return scores


def apply_missing_eos(scores: Tensor, finished: Tensor, rule: str, value: float = 0.0) -> Tensor:
    """Returns the scores (N,) after the rule for responses that were cut off before they ended.

    scores: (N,) float32; finished: (N,) bool, True where the response ended by itself
    rule: "subtract" takes value off their scores; "replace" makes value of them; "none" changes nothing

    Raises: ValueError for another rule.
    Source: subtract is that of TRL, replace that of Stiennon et al., arXiv 2009.01325."""
    changed = {"none": scores, "subtract": scores - value, "replace": torch.full_like(scores, value)}
    if rule not in changed:
        raise ValueError(f"apply_missing_eos: rule must be none, subtract or replace, got {rule!r}")
    return torch.where(finished, scores, changed[rule])
