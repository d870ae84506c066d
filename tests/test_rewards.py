"""Reward shaping against small cases worked by hand."""

import pytest
import torch

from fastrlhf.rewards import adapt_kl_coef, apply_missing_eos, shape_rewards


def test_score_lands_on_the_last_token_and_the_penalty_on_every_token():
    logprobs, ref = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -2.0])
    rewards = shape_rewards(torch.tensor([10.0, 20.0]), logprobs, ref, torch.tensor([0, 2, 3]).int(), kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([-0.05, 10.0, 20.1]))


def test_rewards_of_a_response_sum_to_score_minus_its_kl():
    logprobs, ref = torch.randn(9), torch.randn(9)
    rewards = shape_rewards(torch.tensor([3.0]), logprobs, ref, torch.tensor([0, 9]).int(), kl_coef=0.2)
    torch.testing.assert_close(rewards.sum(), 3.0 - 0.2 * (logprobs - ref).sum())


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
