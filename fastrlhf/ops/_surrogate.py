"""What the policy losses share: one ratio a token or a sequence, from given log-probs or from a head."""

from typing import Any

import torch
from torch import Tensor

from fastrlhf.ops._check import WIDE, alike

STATS = ("clip_fraction", "approx_kl", "ratio", "ratio_max", "ratio_min")


def surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(the loss of each token, its slope in the log-ratio, whether a bound holds its ratio, so that the slope is 0)."""
    # with advantage 0 any ratio gives 0, also one that overflows; a NaN stays
    log_ratio = torch.where((advantages == 0) & (log_ratio > 0), 0, log_ratio)
    with torch.no_grad():
        ratio = log_ratio.exp()
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
        bound, held = clipped, clipped > plain
        if dual_clip is not None:
            limit = -advantages * dual_clip
            over = (advantages < 0) & (torch.where(held, clipped, plain) > limit)
            bound, held = torch.where(over, limit, clipped), held | over
    # the ratio of what is held is left out before exp, whose gradient would be 0 times infinity where it overflows
    slopes = torch.where(held, 0, -advantages * torch.where(held, 0, log_ratio).exp())
    return torch.where(held, bound, slopes), slopes.detach(), held


def clip_bounds(
    function: str, clip_range: float | tuple[float, float], dual_clip: float | None
) -> tuple[float, float, float | None]:
    """(low, high, dual_clip); raises unless 0 <= low <= 1, high >= 0 and dual_clip > 1."""
    given = tuple(clip_range) if isinstance(clip_range, (tuple, list)) else (clip_range, clip_range)
    if len(given) != 2 or not (0 <= given[0] <= 1 and given[1] >= 0):
        shown = f"({', '.join(map(str, given))})"
        raise ValueError(f"{function}: clip_range must be 0 <= low <= 1 and high >= 0, got {shown}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"{function}: dual_clip must be above 1 or None, got {dual_clip}")
    return *given, dual_clip


def largest(x: Tensor, kept: Tensor) -> Tensor:
    """The largest kept element, 0 without one."""
    padded = torch.cat([torch.where(kept, x, -torch.inf).flatten(), x.new_full((1,), -torch.inf)])
    return torch.where(kept.any(), padded.amax(), 0)


def check(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None, *_: Any) -> None:
    """The checks of tensors that both forms make, in the name of the public function."""
    tensors = {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages}
    alike("ppo_policy_loss", WIDE, tensors, mask)


def fake(logprobs: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised outputs: the loss, its statistics, its gradient with respect to logprobs."""
    grad = torch.empty_like(logprobs, memory_format=torch.contiguous_format)
    return logprobs.new_empty(()), logprobs.new_empty(len(STATS)), grad
