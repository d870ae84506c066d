"""Rules about scores and the KL coefficient against small cases worked by hand."""

import pytest
import torch

from fastrlhf import PPOConfig
from fastrlhf.formulas.kl import adapt_kl_coef, next_kl_coef
from fastrlhf.rewards.shaping import RunningMoments, apply_missing_eos, shape_scores


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


def config(**changes):
    return PPOConfig(model="m", data="d", output="o", reward="r", **{"max_new_tokens": 10, **changes})


def test_a_planned_kl_coefficient_goes_to_its_end_in_equal_ratios():
    settings = config(kl_coef=0.1, kl_coef_end=0.0001, steps=4)
    found = [0.1]
    for _ in range(3):
        found.append(next_kl_coef(settings, found[-1], kl=123.0, step=len(found)))
    assert found == pytest.approx([0.1, 0.01, 0.001, 0.0001])
    assert next_kl_coef(config(kl_coef=0.1), 0.1, kl=123.0, step=1) == 0.1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1.0, 4.0, -2.0]),
        ({"score_norm": "whiten"}, [0.0, 3 / 6**0.5, -3 / 6**0.5]),  # mean 1, variance (0 + 9 + 9) / 3
        ({"score_norm": "scale"}, [1 / 6**0.5, 4 / 6**0.5, -2 / 6**0.5]),
        ({"score_clip": 1.5}, [1.0, 1.5, -1.5]),
        ({"missing_eos": "replace:-1"}, [1.0, 4.0, -1.0]),  # the third was cut off
        ({"missing_eos": "replace:-1", "min_response_tokens": 3}, [-1.0, 4.0, -1.0]),  # and the first is too short
        ({"length_penalty": 0.1}, [0.8, 3.4, -3.0]),
        ({"overlong_tokens": 5, "overlong_penalty": 2.0}, [1.0, 3.6, -4.0]),
        ({"score_clip": 1.5, "missing_eos": "subtract:1", "length_penalty": 0.5}, [0.0, -1.5, -7.5]),
    ],
)
def test_scores_are_shaped_rule_by_rule(changes, expected):
    scores, lengths = torch.tensor([1.0, 4.0, -2.0]), torch.tensor([2, 6, 10])
    moments = RunningMoments()
    moments.add(scores)
    found = shape_scores(scores, lengths, torch.tensor([True, True, False]), config(**changes), moments)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_running_moments_are_those_of_all_scores_together():
    scores = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e3
    moments = RunningMoments()
    for part in scores.split([1, 20, 3, 26]):
        moments.add(part)
    assert (moments.count, moments.mean) == (50, pytest.approx(scores.mean().item(), rel=1e-12))
    assert moments.deviation == pytest.approx(scores.std(correction=0).item(), rel=1e-9)


def test_equal_scores_are_not_scaled():
    moments = RunningMoments()
    moments.add(torch.full((4,), 3.0))
    assert moments.deviation == 1
