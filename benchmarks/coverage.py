"""How often intervals hold the truth, and how often tests see what is not there, in 500 simulated data sets each.

    python -m benchmarks.coverage                 # a minute or two of one core; into results/cpu/coverage
    python -m benchmarks.coverage falls drift     # some of them

An interval of 95 % should hold the truth in 95 % of the data sets, a test of level 5 % see something in 5 % of those
that hold nothing; the last column is how far off chance alone makes that, three standard errors. `before` is what
this project did earlier, for comparison.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator

from fastrlhf.stats.accuracy import accuracy, wilson_interval
from fastrlhf.stats.calibration import measure
from fastrlhf.stats.correlation import correlation_interval, paired_pearson, spearman
from fastrlhf.stats.drift import drift
from fastrlhf.stats.falls import Falls, fall_after_best, t_quantile
from fastrlhf.stats.means import Mean

RESULTS = Path(__file__).parent / "results" / "cpu" / "coverage" / "coverage.csv"
NUM = 500  # data sets
COLUMNS = ("what", "data sets", "wanted", "found", "by chance")
Line = tuple[str, float, list[bool]]  # what, the share that is wanted, and in which data sets it was so


def accuracies(rng: Generator) -> Iterator[Line]:
    """Pairs on 60 prompts, 1 to 9 on each, right with a probability that differs by prompt; half of the pairs are
    written the other way round, some are ties, some undecided."""
    for name, low, high in (("differ", 0.2, 0.9), ("are alike", 0.6, 0.6), ("differ, few wrong", 0.8, 1.0)):
        inside, before = [], []
        for _ in range(NUM):
            sizes = rng.integers(1, 10, 60)
            chances, clusters = rng.choice([low, high], 60).repeat(sizes), np.arange(60).repeat(sizes)
            ties, turned = rng.random(len(chances)) < 0.05, rng.random(len(chances)) < 0.5
            right = rng.random(len(chances)) < chances
            margins = np.where(ties, 0.0, np.where(right == turned, -1.0, 1.0))
            labels = np.where(rng.random(len(chances)) < 0.1, 0.5, np.where(turned, 0.2, 0.8))
            found = accuracy(torch.tensor(margins), torch.tensor(labels), clusters=clusters.tolist())
            truth = 0.5 * 0.05 + 0.95 * (low + high) / 2
            inside.append(found.low <= truth <= found.high)
            ends = wilson_interval(found.accuracy, found.num)
            before.append(ends[0] <= truth <= ends[1])
        yield f"interval of the accuracy, prompts {name}", 0.95, inside
        yield f"the same, before: pairs as if independent, prompts {name}", 0.95, before


def means(rng: Generator) -> Iterator[Line]:
    """A mean and its standard error, as an interval by Student's t."""
    for num in (3, 10, 100):
        found = [Mean.of(torch.tensor(rng.normal(size=num))) for _ in range(NUM)]
        limit = t_quantile(0.025, num - 1)
        yield f"mean of {num} values within t errors", 0.95, [abs(mean.mean) <= limit * mean.error for mean in found]


def correlations(rng: Generator) -> Iterator[Line]:
    """Of pairs with a correlation of 0.5, and by rank that of two normal variables, 6 / pi asin(r / 2)."""
    for num in (20, 200):
        straight, by_rank = [], []
        for _ in range(NUM):
            x, y = torch.tensor(rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], num)).T
            low, high = correlation_interval(paired_pearson(x, y), num)
            straight.append(low <= 0.5 <= high)
            low, high = correlation_interval(spearman(x, y), num, by_rank=True)
            by_rank.append(low <= 6 / math.pi * math.asin(0.25) <= high)
        yield f"interval of the correlation within {num} pairs", 0.95, straight
        yield f"interval of the correlation by rank, {num} rows", 0.95, by_rank


def drifts(rng: Generator) -> Iterator[Line]:
    """Sets of 20 and 30 prompts of one population, of which the sets share more the smaller it is."""
    for size in (10_000, 60, 33):
        population = [rng.integers(0, 40, rng.integers(1, 30)).tolist() for _ in range(size)]
        found = []
        for n in range(NUM):
            first, second = (rng.choice(size, num, replace=False) for num in (20, 30))
            sets = ([population[row] for row in rows] for rows in (first, second))
            found.append(drift(*sets, num_permutations=39, seed=n))
        shared = np.mean([result.shared for result in found])
        for level in (0.05, 0.5):
            name = f"{shared:.0%} of the prompts in both: p <= {level}"
            yield f"words, {name}", level, [result.divergence_p <= level for result in found]
            yield f"lengths (of few values, so at most), {name}", level, [result.lengths_p <= level for result in found]


def falls(rng: Generator) -> Iterator[Line]:
    """A flat truth of 24 points on the same prompts, whose values have a small part of the prompt's own."""
    for num in (12, 192):
        curves = [torch.tensor(0.3 * rng.normal(size=num) + rng.normal(size=(24, num))) for _ in range(NUM)]
        at_end = [fall_after_best(curve) for curve in curves]
        yield f"fall of more than 2 errors (at most), {num} prompts", 0.05, [fall.z_score > 2 for fall in at_end]
        yield (
            f"the same, before: unpaired, from the highest, {num} prompts",
            0.05,
            [fell_before(curve) for curve in curves],
        )
        yield f"a warning at some point (at most), {num} prompts", 0.05, [warned(curve) for curve in curves]
    rise = torch.tensor([min(n, 24 - n) / 12 for n in range(25)])[:, None]
    curves = [rise + torch.tensor(rng.normal(size=192) + rng.normal(size=(25, 192))) for _ in range(NUM)]
    yield "a warning where it rises by one deviation and falls again, 192 prompts", 1.0, [warned(c) for c in curves]


def fell_before(curve: torch.Tensor) -> bool:
    """By two errors of independent means, from the highest of them."""
    points = [Mean.of(values) for values in curve]
    best, last = max(points, key=lambda mean: mean.mean), points[-1]
    return best.mean - last.mean > 2 * math.hypot(best.error, last.error)


def warned(curve: torch.Tensor) -> bool:
    """Whether a run would say so at some point."""
    watching = Falls()
    for values in curve:
        fall = watching.add(values)
        if fall.mean > watching.limit(fall):
            return True
    return False


def calibrations(rng: Generator) -> Iterator[Line]:
    """Outcomes drawn from the probabilities themselves: an error above that of 19 of 20 by chance."""
    for num in (100, 1000):
        above = []
        for n in range(NUM):
            margins = torch.tensor(rng.normal(scale=2, size=num))
            labels = (torch.tensor(rng.random(num)) < margins.sigmoid()).double()
            found = measure(margins, labels, seed=n)
            above.append(found.ece > found.ece_by_chance_high)
        yield f"calibration error above chance, {num} pairs", 0.05, above


PARTS: dict[str, Callable[[Generator], Iterator[Line]]] = {
    part.__name__: part for part in (accuracies, means, correlations, drifts, falls, calibrations)
}


def main(arguments: list[str]) -> None:
    """Prints a line for each, and writes the file if all were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all without one")
    asked = parser.parse_args(arguments).parts or list(PARTS)
    if unknown := set(asked) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    rows = []
    for name in asked:
        for what, wanted, hits in PARTS[name](np.random.default_rng(0)):
            chance = 3 * math.sqrt(wanted * (1 - wanted) / len(hits))
            rows.append((what, len(hits), f"{wanted:.3f}", f"{np.mean(hits):.3f}", f"{chance:.3f}"))
            print(f"{what:>85}  wanted {wanted:.3f}  found {np.mean(hits):.3f}  ± {chance:.3f}", flush=True)
    if len(asked) == len(PARTS):
        with RESULTS.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main(sys.argv[1:])
