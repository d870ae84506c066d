"""The statistics beside scipy's and statsmodels', where they are installed."""

import numpy as np
import pytest
import torch

from fastrlhf.stats.accuracy import accuracy, effective_num, number, wilson_interval
from fastrlhf.stats.correlation import correlation_interval, pearson, spearman
from fastrlhf.stats.drift import js_terms, ks_statistic
from fastrlhf.stats.falls import t_quantile
from fastrlhf.stats.means import Mean

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")


def test_means_and_quantiles_are_scipys():
    values = np.random.default_rng(0).normal(size=40)
    found = Mean.of(torch.tensor(values))
    assert (found.mean, found.error) == pytest.approx((values.mean(), stats.sem(values)))
    for freedoms in (10, 40, 200):
        for level in (0.05, 1e-3, 1e-5):
            assert t_quantile(level, freedoms) == pytest.approx(stats.t.isf(level, freedoms), rel=0.01)


def test_correlations_and_their_intervals_are_scipys():
    x, y = np.random.default_rng(1).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 50).T
    result = stats.pearsonr(x, y)
    r = pearson(torch.tensor(x), torch.tensor(y))
    assert r == pytest.approx(result.statistic)
    assert correlation_interval(r, 50) == pytest.approx(tuple(result.confidence_interval(0.95)), abs=1e-6)
    tied = (np.round(x), np.round(y))
    assert spearman(*map(torch.tensor, tied)) == pytest.approx(stats.spearmanr(*tied).statistic)


def test_divergence_and_distance_of_distributions_are_scipys():
    distance = pytest.importorskip("scipy.spatial.distance").jensenshannon
    rng = np.random.default_rng(2)
    p, q = rng.integers(0, 9, (2, 30))
    assert js_terms(torch.tensor(p), torch.tensor(q)).sum().item() == pytest.approx(distance(p, q, base=2) ** 2)
    x, y = rng.integers(0, 30, 40), rng.integers(3, 35, 60)
    assert ks_statistic(torch.tensor(x), torch.tensor(y)).item() == pytest.approx(stats.ks_2samp(x, y).statistic)


def test_intervals_of_shares_are_statsmodels_and_so_is_the_cluster_robust_error():
    api = pytest.importorskip("statsmodels.api", reason="statsmodels is not installed")
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    assert wilson_interval(0.71, 100) == pytest.approx(proportion.proportion_confint(71, 100, method="wilson"))
    rng = np.random.default_rng(3)
    clusters = rng.integers(0, 50, 300)
    hits = (rng.random(300) < rng.choice([0.2, 0.9], 50)[clusters]).astype(float)
    model = api.OLS(hits, np.ones(300))
    robust = model.fit(
        cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": False, "df_correction": False}
    )
    share, num = hits.mean(), len(np.unique(clusters))
    trials = effective_num(torch.tensor(hits), number(clusters.tolist()))
    assert 1 + (num - 1) / num * share * (1 - share) / robust.bse[0] ** 2 == pytest.approx(trials)
    found = accuracy(torch.tensor(2 * hits - 1), clusters=clusters.tolist())
    assert (found.accuracy, found.num_clusters) == (pytest.approx(share), num)
