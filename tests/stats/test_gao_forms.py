"""The forms of Gao et al.: parameters, errors and peaks against numpy and a grid."""

import numpy as np
import pytest
import torch

from fastrlhf.stats.gao_forms import Fit, fit

FORMS = {"best_of_n": lambda d, a, b: d * (a - b * d), "ppo": lambda d, a, b: d * (a - b * np.log(d))}


@pytest.mark.parametrize("form", FORMS)
def test_a_fit_finds_the_least_squares_and_their_spread(form):
    rng = np.random.default_rng(0)
    kl = np.linspace(0.1, 9, 12)
    exact = FORMS[form](np.sqrt(kl), 1.3, 0.4)
    clean = fit(torch.from_numpy(kl), torch.from_numpy(exact), form)
    assert (clean.alpha, clean.beta, clean.r_squared) == pytest.approx((1.3, 0.4, 1.0))
    fits = [fit(torch.from_numpy(kl), torch.from_numpy(exact + rng.normal(0, 0.2, 12)), form) for _ in range(2000)]
    for name, truth in (("alpha", 1.3), ("beta", 0.4)):
        values, errors = (np.array([getattr(f, key) for f in fits]) for key in (name, f"{name}_error"))
        assert values.mean() == pytest.approx(truth, abs=4 * values.std() / 2000**0.5)
        assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.05)
    noisy = exact + rng.normal(0, 0.2, 12)
    d = np.sqrt(kl)
    design = np.stack([FORMS[form](d, 1, 0), FORMS[form](d, 0, 1)], 1)
    expected = np.linalg.lstsq(design, noisy, rcond=None)[0]
    found = fit(torch.from_numpy(kl), torch.from_numpy(noisy), form)
    np.testing.assert_allclose([found.alpha, found.beta], expected, rtol=1e-10)
    assert found(4.0) == pytest.approx(FORMS[form](2.0, *expected))


@pytest.mark.parametrize("form", FORMS)
def test_the_peak_is_the_highest_point_of_a_grid(form):
    found = Fit(form, 1.1, 0.5, 0, 0, 1, 3)
    d = np.linspace(1e-3, 10, 1_000_000)
    values = FORMS[form](d, 1.1, 0.5)
    kl, height = found.peak
    assert kl == pytest.approx(d[values.argmax()] ** 2, rel=1e-3) and height == pytest.approx(values.max(), rel=1e-6)


def test_a_form_that_only_rises_has_no_peak():
    assert Fit("best_of_n", 1.0, -0.1, 0, 0, 1, 3).peak is None and Fit("ppo", 1.0, 0.0, 0, 0, 1, 3).peak is None
    assert Fit("best_of_n", -1.0, 0.1, 0, 0, 1, 3).peak is None and Fit("ppo", 1.0, 1e-6, 0, 0, 1, 3).peak is None


@pytest.mark.parametrize(
    ("kl", "reward", "form", "text"),
    [
        ([1, 2, 3], [1, 2, 3], "bon", "form must be best_of_n or ppo"),
        ([0, -1, 1, 2], [0, 0, 1, 2], "ppo", "three points with a KL above 0 .* got 2"),
        ([2, 2, 2], [0, 1, 2], "best_of_n", "two of different KL"),
        ([1, 2, float("nan")], [0, 1, 2], "best_of_n", "must be finite"),
    ],
)
def test_points_that_no_form_can_be_fitted_to_are_refused(kl, reward, form, text):
    with pytest.raises(ValueError, match=text):
        fit(torch.tensor(kl, dtype=torch.float64), torch.tensor(reward, dtype=torch.float64), form)
