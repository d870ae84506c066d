"""From the scores of responses to what is paid for them: normalised, clipped, less for what is cut off or too long."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrlhf.settings.ppo import PPOConfig, parse_missing_eos


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
    scores: Tensor, lengths: Tensor, finished: Tensor, config: PPOConfig, moments: RunningMoments
) -> Tensor:
    """Returns what is paid for the responses, (N,) float32: the rules of `config`, in this order.

    score_norm (by `moments`, which have taken up the scores), score_clip, missing_eos for responses that are
    unfinished or shorter than min_response_tokens, length_penalty, and the soft limit of overlong_tokens:
    a penalty that grows linearly from 0, overlong_tokens before max_new_tokens, to overlong_penalty there.

    scores: (N,) float32; lengths: (N,) int64 response tokens; finished: (N,) bool, ended by itself

    Source: Yu et al., arXiv 2503.14476, equation 13 (overlong)."""
    if config.score_norm != "none":
        scores = (scores - moments.mean if config.score_norm == "whiten" else scores) / moments.deviation
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    scores = apply_missing_eos(scores, finished & (lengths >= config.min_response_tokens), config.missing_eos)
    scores = scores - config.length_penalty * lengths
    if config.overlong_tokens:
        excess = lengths - (config.max_new_tokens - config.overlong_tokens)
        scores = scores - config.overlong_penalty * (excess / config.overlong_tokens).clamp(0, 1)
    return scores


def apply_missing_eos(scores: Tensor, finished: Tensor, rule: str) -> Tensor:
    """Returns the scores (N,) after the rule for responses that were cut off before they ended.

    scores: (N,) float32
    finished: (N,) bool, True where the response ended by itself
    rule: "none"; "subtract:V" takes V off the score; "replace:V" makes it V

    Raises: ValueError for another rule.
    Source: subtract is that of TRL, replace that of Stiennon et al., arXiv 2009.01325."""
    kind, value = parse_missing_eos(rule)
    if kind == "subtract":
        return torch.where(finished, scores, scores - value)
    if kind == "replace":
        return torch.where(finished, scores, torch.full_like(scores, value))
    return scores
