"""The KL coefficient over a run against small cases worked by hand."""

import pytest

from fastrlhf.formulas.kl import adapt_kl_coef, planned_kl_coef


def test_kl_coef_moves_towards_the_target_by_at_most_a_fifth_a_horizon():
    assert adapt_kl_coef(0.1, 6.0, target=6.0, num_responses=512) == 0.1
    assert adapt_kl_coef(0.1, 600.0, target=6.0, num_responses=10_000) == pytest.approx(0.12)
    assert adapt_kl_coef(0.1, -5.0, target=6.0, num_responses=10_000) == pytest.approx(0.08)
    assert adapt_kl_coef(0.1, 6.6, target=6.0, num_responses=1_000) == pytest.approx(0.101)


def test_a_planned_kl_coefficient_goes_to_its_end_in_equal_ratios():
    found = [planned_kl_coef(0.1, 0.0001, step=step, num_steps=4) for step in range(4)]
    assert found == pytest.approx([0.1, 0.01, 0.001, 0.0001])
    assert planned_kl_coef(0.1, 0.0001, step=0, num_steps=1) == 0.1
