"""Rules about scores and the KL coefficient against small cases worked by hand."""

import pytest
import torch

from fastrlhf.rewards import adapt_kl_coef, apply_missing_eos


@pytest.mark.parametrize(
    ("rule", "expected"), [("none", [1.0, 2.0]), ("subtract:0.5", [1.0, 1.5]), ("replace:-1", [1.0, -1.0])]
)
def test_missing_eos_rule_touches_only_unfinished_responses(rule, expected):
    scores = apply_missing_eos(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), rule)
    assert scores.tolist() == expected


@pytest.mark.parametrize("rule", ["subtract", "replace:x", "drop:1", "", "subtract:nan", "replace:-inf"])
def test_unknown_missing_eos_rule_is_refused(rule):
    with pytest.raises(ValueError, match="expected none, subtract:V or replace:V"):
        apply_missing_eos(torch.zeros(1), torch.tensor([True]), rule)


def test_kl_coef_moves_towards_the_target_by_at_most_a_fifth_a_horizon():
    assert adapt_kl_coef(0.1, 6.0, target=6.0, num_responses=512) == 0.1
    assert adapt_kl_coef(0.1, 600.0, target=6.0, num_responses=10_000) == pytest.approx(0.12)
    assert adapt_kl_coef(0.1, -5.0, target=6.0, num_responses=10_000) == pytest.approx(0.08)
    assert adapt_kl_coef(0.1, 6.6, target=6.0, num_responses=1_000) == pytest.approx(0.101)
