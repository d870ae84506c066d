import numpy as np
import pytest
import torch

from fastrlhf.stats.ensembles import ensemble


def test_combinations_are_those_of_a_loop_over_pairs():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(3, 50, 2)) + np.array([0.4, 0])
    result = ensemble(torch.tensor(scores))
    rules = {
        "mean": np.mean,
        "min": np.min,
        "mean_minus_std": lambda column: np.mean(column) - np.std(column),
    }
    for name, rule in rules.items():
        right = [rule(scores[:, n, 0]) > rule(scores[:, n, 1]) for n in range(50)]
        assert getattr(result, name).accuracy == pytest.approx(np.mean(right)), name
    margins = scores[..., 0] - scores[..., 1]
    assert [each.accuracy for each in result.members] == pytest.approx((margins > 0).mean(1).tolist())
    assert result.score_std == pytest.approx(scores.std(0).mean())
    assert result.margin_std == pytest.approx(margins.std(0).mean())
    assert result.split == pytest.approx(np.mean([len(set(np.sign(margins[:, n]))) > 1 for n in range(50)]))


def test_where_models_disagree_they_are_wrong_more_often():
    generator = np.random.default_rng(1)
    noise = generator.choice([0.2, 4.0], 4000)
    margins = 1 + noise * generator.normal(size=(4, 4000))
    result = ensemble(torch.tensor(np.stack([margins, 0 * margins], -1)), num_bins=2)
    calm, torn = result.bins
    assert calm.disagreement < 0.5 < 2 < torn.disagreement
    assert calm.accuracy.accuracy > 0.99 > 0.8 > torn.accuracy.accuracy
    assert calm.accuracy.num + torn.accuracy.num == 4000


def test_a_constant_that_one_model_adds_moves_scores_and_no_margins():
    scores = torch.randn(2, 30, 2, generator=torch.Generator().manual_seed(0))
    moved = scores + torch.tensor([0.0, 5.0])[:, None, None]
    before, after = ensemble(scores), ensemble(moved)
    assert after.margin_std == pytest.approx(before.margin_std, rel=1e-5)
    assert after.score_std > before.score_std + 1
    assert after.mean == before.mean


def test_one_model_is_no_ensemble():
    with pytest.raises(ValueError, match="at least 2 models"):
        ensemble(torch.zeros(1, 3, 2))
