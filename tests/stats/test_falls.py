"""Falls after the best of several points: how often a flat truth looks like one, and that a true one is seen."""

import math

import mpmath
import numpy as np
import pytest
import torch

from fastrlhf.stats.falls import Falls, fall_after_best, t_quantile

NUM = 200  # curves; `python -m benchmarks.coverage` draws 500


def curve(means, num_prompts, seed):
    """(K, P) values of prompts that differ among themselves as much as an answer does from another one."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(num_prompts, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(means), num_prompts, generator=generator, dtype=torch.float64)
    return torch.tensor(means, dtype=torch.float64)[:, None] + level + noise


def shows_a_fall(points):
    """Whether somebody who looks at each of the points sees one."""
    falls = Falls()
    return any(fall.mean > falls.limit(fall) for fall in map(falls.add, points))


def test_the_half_that_does_not_choose_measures_by_hand():
    points = torch.tensor([[1.0, 5.0, 1.0, 5.0], [4.0, 2.0, 4.0, 0.0], [0.0, 0.0, 2.0, 2.0]])
    # the even prompts are best at the second point, by which the odd ones fell by 2 - 0 and 0 - 2; and so on
    falls = [1 - 0, 2 - 0, 1 - 2, 0 - 2]
    found = fall_after_best(points)
    assert (found.mean, found.num) == (np.mean(falls), 4)
    assert found.error == pytest.approx(np.std(falls, ddof=1) / 2)
    assert fall_after_best(points[:1]).mean == 0
    one = fall_after_best(points[:, :1])
    assert one.mean == 4 and math.isnan(one.error)


def test_a_flat_truth_falls_by_two_errors_in_one_of_twenty_cases_at_most():
    """From the best of 24 points by the difference of means it was one in five."""
    found = [fall_after_best(curve([0.0] * 24, 100, seed)) for seed in range(NUM)]
    allowed = 3 * math.sqrt(0.0228 * 0.9772 / NUM)
    assert np.mean([fall.z_score > 2 for fall in found]) == pytest.approx(0.0228, abs=allowed)
    assert abs(np.mean([fall.z_score for fall in found])) < 3 / math.sqrt(NUM), "it is not ahead by chance"


def test_whoever_looks_at_every_point_of_a_flat_truth_sees_no_fall_and_sees_a_true_one():
    for num_prompts in (12, 100):
        share = np.mean([shows_a_fall(curve([0.0] * 24, num_prompts, seed)) for seed in range(NUM)])
        assert share < 0.05 + 3 * math.sqrt(0.05 * 0.95 / NUM), num_prompts
    rising = [min(n, 24 - n) / 8 for n in range(24)]
    assert np.mean([shows_a_fall(curve(rising, 100, seed)) for seed in range(40)]) > 0.95


@pytest.mark.parametrize("num_prompts", [1, 2, 3, 5, 6, 8])
@pytest.mark.parametrize("marks", [2, 3])
def test_marks_on_a_few_prompts_that_stay_as_good_show_no_fall(num_prompts, marks):
    """Of 2 or 3 prompts all fall from right to wrong at one of 24 points in every third curve."""
    generator = torch.Generator().manual_seed(0)
    curves = torch.randint(marks, (NUM, 24, num_prompts), generator=generator)
    seen = sum(shows_a_fall(points) for points in curves)
    assert seen / NUM < 0.05 + 3 * math.sqrt(0.05 * 0.95 / NUM)


@pytest.mark.parametrize("freedoms", [6, 20, 191])
def test_quantiles_are_those_of_students_distribution(freedoms):
    for level in (0.025, 0.005, 1e-4):
        t = t_quantile(level, freedoms)
        x = freedoms / (freedoms + mpmath.mpf(t) ** 2)
        above = mpmath.betainc(freedoms / 2, 0.5, 0, x, regularized=True) / 2
        assert float(above) == pytest.approx(level, rel=0.1 if freedoms < 10 else 0.02)
    assert math.isnan(t_quantile(0.05, 0))


def test_a_state_that_was_saved_goes_on():
    points = curve([0.0, 1.0, 0.5], 8, 0)
    whole, cut = Falls(), Falls()
    for values in points[:2]:
        whole.add(values), cut.add(values)
    resumed = Falls()
    resumed.state = cut.state
    assert resumed.add(points[2]) == whole.add(points[2])
