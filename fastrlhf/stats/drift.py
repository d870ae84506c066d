"""Whether two sets of prompts come from one distribution: permutation tests on their words and on their lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrlhf.errors import UserError

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Drift:
    """Two sets of prompts beside each other; a small p-value says that they are not draws of one distribution.

    divergence: `js_terms` of their tokens, bits, 0 to 1; divergence_by_chance: its mean over permutations
    lengths: `ks_statistic` of their lengths, 0 to 1; lengths_by_chance: its mean over permutations
    divergence_p, lengths_p: (1 + permutations with as large a value) / (1 + permutations)
    shared: share of the second set's prompts that are in the first one, too
    tokens: those that add most to the divergence, each with its share of the first set's tokens and of the second's
    num: prompts compared, of each set"""

    divergence: float
    divergence_by_chance: float
    divergence_p: float
    lengths: float
    lengths_by_chance: float
    lengths_p: float
    shared: float
    tokens: list[tuple[int, float, float]]
    num: tuple[int, int]


def drift(
    first: Prompts,
    second: Prompts,
    *,
    max_prompts: int = 2000,
    num_permutations: int = 400,
    num_tokens: int = 12,
    seed: int = 0,
) -> Drift:
    """Returns how far two sets of prompts differ, and whether by more than chance.

    A prompt counts once in each set. Of sets with more than max_prompts so many are drawn. A prompt that both sets hold
    stays in both, and the others are dealt out anew. The p-values are exact if the sets are draws of different prompts
    from one population: given which prompts both hold, each way to deal the others out to sets of these sizes is as
    likely as any other. Where one set holds the other there is one way, so p is 1.

    first, second: token ids of the prompts; an empty one counts as length 0
    Source: permutation p-values: Phipson and Smyth, Statistical Applications in Genetics 9 (2010) 39.

    Raises: ValueError for a set without prompts, or without any token in both."""
    generator = torch.Generator().manual_seed(seed)
    sets = [list(dict.fromkeys(map(tuple, prompts))) for prompts in (first, second)]
    if not all(sets):
        raise UserError("drift: a set has no prompts")
    known = set(sets[0])
    shared = sum(prompt in known for prompt in sets[1]) / len(sets[1])
    sets = [drawn_from(prompts, max_prompts, generator) for prompts in sets]
    dealt = Dealt(*sets)
    seen = dealt.statistics(dealt.in_first)
    deals = [torch.randperm(len(dealt.in_first), generator=generator) for _ in range(num_permutations)]
    drawn = torch.stack([dealt.statistics(dealt.in_first[deal]) for deal in deals])
    # equal values must count as equal, whatever the order of additions
    p = (1 + (drawn >= seen - 1e-12).double().sum(0)) / (1 + num_permutations)
    counts = dealt.counts(dealt.in_first)
    shares = [own / own.sum().clamp(min=1) for own in counts]
    top = js_terms(*counts).argsort(descending=True, stable=True)[:num_tokens].tolist()
    by_chance = drawn.mean(0)
    return Drift(
        divergence=seen[0].item(),
        divergence_by_chance=by_chance[0].item(),
        divergence_p=p[0].item(),
        lengths=seen[1].item(),
        lengths_by_chance=by_chance[1].item(),
        lengths_p=p[1].item(),
        shared=shared,
        tokens=[(int(dealt.ids[n]), shares[0][n].item(), shares[1][n].item()) for n in top],
        num=(len(sets[0]), len(sets[1])),
    )


class Dealt:
    """Two sets of prompts for a permutation test: prompts of both sets stay, the others can be dealt out anew.

    in_first: (M,) bool, which of those are in the first set; ids: (V,) the tokens that there are"""

    def __init__(self, first: list[tuple[int, ...]], second: list[tuple[int, ...]]) -> None:
        mine, theirs = set(first), set(second)
        both = [prompt for prompt in first if prompt in theirs]
        apart = [prompt for prompt in first if prompt not in theirs], [row for row in second if row not in mine]
        rows = [*both, *apart[0], *apart[1]]
        self.lengths = torch.tensor([len(prompt) for prompt in rows])
        flat = torch.tensor([token for prompt in rows for token in prompt], dtype=torch.int64)
        if not len(flat):
            raise UserError("drift: all prompts are empty")
        self.ids, self.tokens = flat.unique(return_inverse=True)
        self.num_shared = len(both)
        self.in_first = torch.arange(len(rows) - len(both)) < len(apart[0])

    def sets(self, in_first: Tensor) -> tuple[Tensor, Tensor]:
        """Which prompts (N,) are in each set."""
        shared = torch.ones(self.num_shared, dtype=torch.bool)
        return torch.cat([shared, in_first]), torch.cat([shared, ~in_first])

    def counts(self, in_first: Tensor) -> list[Tensor]:
        """(V,) how often each token is in each set."""
        tokens = [self.tokens[own.repeat_interleave(self.lengths)] for own in self.sets(in_first)]
        return [torch.bincount(own, minlength=len(self.ids)) for own in tokens]

    def statistics(self, in_first: Tensor) -> Tensor:
        """(2,) the divergence of the tokens, and the difference of the lengths."""
        divergence = js_terms(*self.counts(in_first)).sum()
        return torch.stack([divergence, ks_statistic(*(self.lengths[own] for own in self.sets(in_first)))])


def drawn_from(rows: list[tuple[int, ...]], num: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Returns num rows drawn without replacement, in their order, or all where there are fewer."""
    keep = torch.randperm(len(rows), generator=generator)[:num].sort().values
    return [rows[row] for row in keep.tolist()]


def js_terms(first: Tensor, second: Tensor) -> Tensor:
    """Returns what each token adds (V,) to the Jensen-Shannon divergence, bits: (p log2 (p / m) + q log2 (q / m)) / 2,
    m = (p + q) / 2. Their sum is between 0 (the same) and 1 (no token in common). first, second: (V,) counts

    Source: Lin, IEEE Transactions on Information Theory 37 (1991) 145."""
    p, q = (counts.double() / counts.sum().clamp(min=1) for counts in (first, second))
    m = (p + q) / 2
    return (torch.special.xlogy(p, p / m).nan_to_num() + torch.special.xlogy(q, q / m).nan_to_num()) / (2 * math.log(2))


def ks_statistic(x: Tensor, y: Tensor) -> Tensor:
    """Returns the largest difference of the distribution functions of two samples, float64: of x (N,) and y (M,).

    Source: Smirnov, Annals of Mathematical Statistics 19 (1948) 279."""
    x, y = x.sort().values, y.sort().values
    both = torch.cat([x, y]).unique()
    below = [torch.searchsorted(each, both, right=True).double() / len(each) for each in (x, y)]
    return (below[0] - below[1]).abs().max()
