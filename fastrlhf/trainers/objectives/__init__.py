"""What a reward model is trained on: the losses of responses that were judged, and what held-out ones tell of it.

An objective takes scores (M, H): H heads at M responses, those of each row in turn. Losses and statistics are sums over
rows / the number of rows of the optimizer step, so that those of micro-batches add up. docs/reward.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastrlhf.data import Loaded, load_labelled, load_pairs, load_rankings, load_ratings
from fastrlhf.trainers.objectives.base import Objective
from fastrlhf.trainers.objectives.pairwise import Pairs, Rankings
from fastrlhf.trainers.objectives.pointwise import Outcomes, Ratings

__all__ = ["LOADERS", "Objective", "Ratings", "make_objective"]

# by layout of the file (data.LAYOUTS): its loader, and the objectives on it, the default first
LOADERS: dict[str, tuple[Callable[..., Loaded[Any]], tuple[str, ...]]] = {
    "pairs": (load_pairs, ("pairs",)),
    "rankings": (load_rankings, ("plackett_luce", "all_pairs")),
    "labelled": (load_labelled, ("outcome",)),
    "ratings": (load_ratings, ("ratings",)),
}


def make_objective(name: str, *args: Any) -> Objective[Any]:
    """The objective of a name of settings.training.OBJECTIVES."""
    if name in ("plackett_luce", "all_pairs"):
        return Rankings(name, *args)
    return {"pairs": Pairs, "outcome": Outcomes, "ratings": Ratings}[name](*args)
