"""Rules about scores against small cases worked by hand."""

import pytest
import torch

from fastrlhf.rewards.shaping import RunningMoments, apply_missing_eos, shape_scores
from fastrlhf.settings.ppo import parse_missing_eos


@pytest.mark.parametrize(
    ("rule", "expected"), [("none", [1.0, 2.0]), ("subtract:0.5", [1.0, 1.5]), ("replace:-1", [1.0, -1.0])]
)
def test_missing_eos_rule_touches_only_unfinished_responses(rule, expected):
    scores = apply_missing_eos(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), *parse_missing_eos(rule))
    assert scores.tolist() == expected


@pytest.mark.parametrize("rule", ["subtract", "replace:x", "drop:1", "", "subtract:nan", "replace:-inf"])
def test_unknown_missing_eos_rule_is_refused(rule):
    with pytest.raises(ValueError, match="expected none, subtract:V or replace:V"):
        parse_missing_eos(rule)


def test_another_rule_or_normalisation_is_refused():
    scores, finished = torch.zeros(1), torch.tensor([True])
    with pytest.raises(ValueError, match="must be none, subtract or replace, got 'drop'"):
        apply_missing_eos(scores, finished, "drop", 1.0)
    given = {"lengths": torch.tensor([1]), "finished": finished, "moments": RunningMoments(), "max_new_tokens": 1}
    with pytest.raises(ValueError, match="must be none, scale or whiten, got 'center'"):
        shape_scores(scores, **given, score_norm="center")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1.0, 4.0, -2.0]),
        ({"score_norm": "whiten"}, [0.0, 3 / 6**0.5, -3 / 6**0.5]),  # mean 1, variance (0 + 9 + 9) / 3
        ({"score_norm": "scale"}, [1 / 6**0.5, 4 / 6**0.5, -2 / 6**0.5]),
        ({"score_clip": 1.5}, [1.0, 1.5, -1.5]),
        ({"missing_eos": ("replace", -1.0)}, [1.0, 4.0, -1.0]),  # the third was cut off
        ({"missing_eos": ("replace", -1.0), "min_response_tokens": 3}, [-1.0, 4.0, -1.0]),  # and the first is too short
        ({"length_penalty": 0.1}, [0.8, 3.4, -3.0]),
        ({"overlong_tokens": 5, "overlong_penalty": 2.0}, [1.0, 3.6, -4.0]),
        ({"score_clip": 1.5, "missing_eos": ("subtract", 1.0), "length_penalty": 0.5}, [0.0, -1.5, -7.5]),
    ],
)
def test_scores_are_shaped_rule_by_rule(changes, expected):
    scores, lengths = torch.tensor([1.0, 4.0, -2.0]), torch.tensor([2, 6, 10])
    moments = RunningMoments()
    moments.add(scores)
    finished = torch.tensor([True, True, False])
    found = shape_scores(scores, lengths, finished, moments=moments, max_new_tokens=10, **changes)
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
