import math

import numpy as np
import pytest
import torch

from fastrlhf.stats.calibration import (
    calibration_error,
    cross_fit,
    error_by_chance,
    fit_temperature,
    measure,
    reliability,
)


def drawn(num, *, temperature=1.0, seed=0):
    """Margins of pairs whose labels are drawn from sigmoid(margin / temperature): the sign of a wrong one is turned."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1.5, num)
    right = generator.random(num) < 1 / (1 + np.exp(-logits))
    return torch.tensor(np.where(right, logits, -logits) * temperature)


def test_measures_are_those_of_a_loop_over_pairs():
    margins, labels = drawn(57), torch.linspace(0, 1, 57).double()
    result = measure(margins, labels)
    losses, squares = [], []
    for d, y in zip(margins.tolist(), labels.tolist(), strict=True):
        p = 1 / (1 + math.exp(-d))
        losses.append(-y * math.log(p) - (1 - y) * math.log(1 - p))
        squares.append((p - y) ** 2)
    assert result.log_loss == pytest.approx(sum(losses) / 57)
    assert result.brier == pytest.approx(sum(squares) / 57)


def test_calibration_error_of_two_bins_by_hand():
    predicted = torch.tensor([0.6, 0.6, 0.9, 0.9], dtype=torch.float64)
    observed = torch.tensor([1.0, 0.0, 1.0, 1.0])
    curve = reliability(predicted, observed, num_bins=2)
    assert (curve.predicted, curve.observed, curve.counts) == ([0.6, 0.9], [0.5, 1.0], [2, 2])
    assert calibration_error(curve) == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)


def test_scores_that_know_nothing_measure_as_a_coin():
    result = measure(torch.zeros(20))
    assert result.log_loss == pytest.approx(math.log(2)) and result.brier == 0.25 and result.ece == 0


def test_calibration_error_of_calibrated_draws_goes_to_0_and_is_what_chance_makes_it():
    errors = [measure(drawn(num)).ece for num in (500, 50_000)]
    assert errors[1] < 0.008 < errors[0]
    by_chance = [measure(drawn(400, seed=seed)) for seed in range(40)]
    assert np.mean([result.ece for result in by_chance]) == pytest.approx(
        np.mean([result.ece_by_chance for result in by_chance]), rel=0.1
    )
    above = np.mean([result.ece > result.ece_by_chance_high for result in by_chance])
    assert above < 0.13  # 5 % are expected
    sure = measure(drawn(400, temperature=3))
    assert sure.ece > 2 * sure.ece_by_chance_high


def test_error_by_chance_of_one_bin_is_the_mean_deviation_of_a_binomial():
    errors = error_by_chance(torch.full((100,), 0.5), num_bins=5, num_draws=4000)
    expected = sum(math.comb(100, k) * abs(k - 50) for k in range(101)) / 2**100 / 100
    assert errors.mean().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_the_temperature_of_simulated_margins_is_found(temperature):
    assert fit_temperature(drawn(40_000, temperature=temperature)) == pytest.approx(temperature, rel=0.04)


def test_the_temperature_is_the_minimum_of_the_loss_on_a_grid():
    margins, labels = drawn(300, temperature=2.5), torch.linspace(0.4, 1, 300).double()
    found = fit_temperature(margins, labels)
    grid = [found * factor for factor in np.linspace(0.5, 2, 400)]
    losses = [measure(margins / each, labels).log_loss for each in grid[::40]]
    assert measure(margins / found, labels).log_loss <= min(losses) + 1e-12


def test_scores_without_a_best_temperature_get_an_end_of_the_range():
    margins = torch.tensor([1.0, 2.0, 3.0])
    assert fit_temperature(margins) == pytest.approx(0.002)
    assert fit_temperature(-margins) == pytest.approx(2000)
    assert fit_temperature(torch.zeros(3)) == 1


def test_no_pair_has_a_part_in_its_own_temperature():
    margins, clusters = drawn(60, temperature=3), [n // 3 for n in range(60)]
    scaled, temperatures = cross_fit(margins, clusters=clusters)
    halves = [[n for n in range(60) if clusters[n] % 2 == half] for half in (0, 1)]
    for half, fitted in enumerate(temperatures):
        assert fitted == fit_temperature(margins[halves[half]])
        others = halves[1 - half]
        torch.testing.assert_close(scaled[others], margins[others] / fitted)
    with pytest.raises(ValueError, match="at least 2 prompts"):
        cross_fit(margins, clusters=["one"] * 60)


def test_a_fitted_temperature_mends_scores_that_are_too_sure():
    margins = drawn(4000, temperature=4)
    scaled, _ = cross_fit(margins)
    before, after = measure(margins), measure(scaled)
    assert after.ece < after.ece_by_chance_high < before.ece
    assert after.log_loss < before.log_loss
