"""The statistics beside scipy's and statsmodels'."""

import numpy as np
import pytest
import statsmodels.api as statsmodels
import torch
from scipy import optimize, stats
from scipy.spatial.distance import jensenshannon
from statsmodels.stats.proportion import proportion_confint

from fastrlhf.stats.accuracy import accuracy, effective_num, number, wilson_interval
from fastrlhf.stats.calibration import fit_temperature, log_loss
from fastrlhf.stats.correlation import correlation_interval, pearson, spearman
from fastrlhf.stats.drift import js_terms, ks_statistic
from fastrlhf.stats.falls import t_quantile
from fastrlhf.stats.gao_forms import fit
from fastrlhf.stats.means import Mean


def test_means_and_quantiles_are_scipys():
    values = np.random.default_rng(0).normal(size=40)
    found = Mean.of(torch.tensor(values))
    assert (found.mean, found.error) == pytest.approx((values.mean(), stats.sem(values)))
    for freedoms, most in ((5, 0.05), (10, 0.01), (40, 1e-3), (200, 1e-5)):  # how far it may be, up to 100 points
        for level in (0.05, 1e-3, 0.05 / (100 * 101)):
            assert t_quantile(level, freedoms) == pytest.approx(stats.t.isf(level, freedoms), rel=most)


def test_correlations_and_their_intervals_are_scipys():
    x, y = np.random.default_rng(1).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 50).T
    result = stats.pearsonr(x, y)
    r = pearson(torch.tensor(x), torch.tensor(y))
    assert r == pytest.approx(result.statistic)
    assert correlation_interval(r, 50) == pytest.approx(tuple(result.confidence_interval(0.95)), abs=1e-6)
    tied = (np.round(x), np.round(y))
    assert spearman(*map(torch.tensor, tied)) == pytest.approx(stats.spearmanr(*tied).statistic)


def test_divergence_and_distance_of_distributions_are_scipys():
    rng = np.random.default_rng(2)
    p, q = rng.integers(0, 9, (2, 30))
    assert js_terms(torch.tensor(p), torch.tensor(q)).sum().item() == pytest.approx(jensenshannon(p, q, base=2) ** 2)
    x, y = rng.integers(0, 30, 40), rng.integers(3, 35, 60)
    assert ks_statistic(torch.tensor(x), torch.tensor(y)).item() == pytest.approx(stats.ks_2samp(x, y).statistic)


def test_the_temperature_is_where_scipy_finds_the_least_loss():
    rng = np.random.default_rng(4)
    margins, labels = torch.tensor(rng.normal(1, 2, 300)), torch.tensor(rng.integers(0, 2, 300) * 0.4 + 0.5)
    least = optimize.minimize_scalar(
        lambda log_t: log_loss(margins / np.exp(log_t), labels), bracket=(-1, 1), tol=1e-12
    )
    assert fit_temperature(margins, labels) == pytest.approx(np.exp(least.x), rel=1e-5)


def test_forms_of_gao_are_fitted_as_scipy_and_statsmodels_fit_them():
    kl = np.linspace(0.2, 20, 30)
    reward = 0.9 * np.sqrt(kl) - 0.12 * kl + np.random.default_rng(5).normal(0, 0.05, 30)
    d = np.sqrt(kl)
    for form, second in (("best_of_n", d), ("ppo", np.log(d))):
        found = fit(torch.tensor(kl), torch.tensor(reward), form)
        columns = np.stack([d, -d * second], 1)
        (alpha, beta), covariance = optimize.curve_fit(lambda x, a, b: x @ (a, b), columns, reward)
        assert (found.alpha, found.beta) == pytest.approx((alpha, beta), rel=1e-6)
        assert (found.alpha_error, found.beta_error) == pytest.approx(np.sqrt(np.diag(covariance)), rel=1e-6)
        least_squares = statsmodels.OLS(reward, columns).fit()
        assert 1 - found.r_squared == pytest.approx(least_squares.ssr / least_squares.centered_tss)


def test_intervals_of_shares_are_statsmodels_and_so_is_the_cluster_robust_error():
    assert wilson_interval(0.71, 100) == pytest.approx(proportion_confint(71, 100, method="wilson"))
    assert wilson_interval(0.71, 100) == pytest.approx(tuple(stats.binomtest(71, 100).proportion_ci(method="wilson")))
    rng = np.random.default_rng(3)
    clusters = rng.integers(0, 50, 300)
    hits = (rng.random(300) < rng.choice([0.2, 0.9], 50)[clusters]).astype(float)
    model = statsmodels.OLS(hits, np.ones(300))
    robust = model.fit(
        cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": False, "df_correction": False}
    )
    share, num = hits.mean(), len(np.unique(clusters))
    trials = effective_num(torch.tensor(hits), number(clusters.tolist()))
    assert 1 + (num - 1) / num * share * (1 - share) / robust.bse[0] ** 2 == pytest.approx(trials)
    found = accuracy(torch.tensor(2 * hits - 1), clusters=clusters.tolist())
    assert (found.accuracy, found.num_clusters) == (pytest.approx(share), num)
