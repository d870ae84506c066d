"""Accuracy on a benchmark of several subsets, put together as RewardBench does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastrlhf.errors import UserError
from fastrlhf.stats.accuracy import Accuracy, accuracy

# section of each subset of RewardBench (Lambert et al., arXiv 2403.13787)
REWARD_BENCH = {
    **dict.fromkeys(("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard"), "Chat"),
    **dict.fromkeys(("mt-bench-easy", "mt-bench-med"), "Chat"),
    **dict.fromkeys(("mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor"), "Chat Hard"),
    **dict.fromkeys(("llmbar-adver-GPTInst", "llmbar-adver-GPTOut", "llmbar-adver-manual"), "Chat Hard"),
    **dict.fromkeys(("refusals-dangerous", "refusals-offensive", "donotanswer"), "Safety"),
    **dict.fromkeys(("xstest-should-refuse", "xstest-should-respond"), "Safety"),
    **dict.fromkeys(("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"), "Reasoning"),
}


@dataclass(frozen=True)
class Sections:
    """subsets: (section, accuracy) of each; sections: accuracy of each; overall: mean of the sections, each once"""

    subsets: dict[str, tuple[str, Accuracy]]
    sections: dict[str, float]
    overall: float


def sections(margins: Tensor, subsets: Sequence[str], names: Sequence[str | None] | None = None) -> Sections:
    """Returns the accuracy of each subset and section.

    A section's accuracy is the mean over its pairs, so that a subset counts by its size; but `math-prm` counts as many
    pairs as all subsets hep-* of its section together, if there are some: mathematics weighs what code does. The
    overall figure is the mean over sections. Ties count half, as everywhere here.

    margins: (N,); subsets: of each pair; names: its section; default, and where it is None: RewardBench's for a subset
    of RewardBench, the subset itself for others
    Source: Lambert et al., arXiv 2403.13787; the weights: EXAMPLE_COUNTS of github.com/allenai/reward-bench.

    Raises: ValueError for a subset in two sections, or no pairs."""
    rows: dict[str, list[int]] = {}
    home: dict[str, str] = {}
    for n, subset in enumerate(subsets):
        given = names[n] if names is not None else None
        section = REWARD_BENCH.get(subset, subset) if given is None else given
        if home.setdefault(subset, section) != section:
            raise UserError(f"sections: subset {subset!r} is in {home[subset]!r} and in {section!r}")
        rows.setdefault(subset, []).append(n)
    results = {subset: accuracy(margins[own]) for subset, own in rows.items()}
    totals: dict[str, list[float]] = {}
    for subset, result in results.items():
        code = sum(len(own) for name, own in rows.items() if name.startswith("hep-") and home[name] == home[subset])
        weight = code if subset == "math-prm" and code else result.num
        total = totals.setdefault(home[subset], [0.0, 0.0])
        total[0] += weight * result.accuracy
        total[1] += weight
    if not totals:
        raise UserError("sections: there are no pairs")
    shares = {section: hit / weight for section, (hit, weight) in totals.items()}
    return Sections(
        {subset: (home[subset], result) for subset, result in results.items()},
        shares,
        sum(shares.values()) / len(shares),
    )
