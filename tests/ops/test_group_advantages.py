"""Group advantages against the standard library's statistics and small cases."""

import math
import statistics

import pytest
import torch
from compare import filled

from fastrlhf import group_advantages
from fastrlhf.ops.group_advantages import group_advantages_ref

KINDS = ("grpo", "dr_grpo", "rloo")


def cu(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kinds_are_what_their_papers_say(dtype):
    lengths = [4, 2, 7, 64]
    scores = torch.randn(sum(lengths), dtype=torch.float64).to(dtype)
    actual = {kind: group_advantages(scores, cu(*lengths), kind=kind).split(lengths) for kind in KINDS}
    for g, group in filled(enumerate(scores.split(lengths))):
        values = group.tolist()
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        total = sum(values)
        expected = {
            "grpo": [(s - mean) / (deviation + 1e-6) for s in values],
            "dr_grpo": [s - mean for s in values],
            "rloo": [s - (total - s) / (len(values) - 1) for s in values],
        }
        for kind in KINDS:
            torch.testing.assert_close(actual[kind][g], torch.tensor(expected[kind], dtype=dtype))


def test_two_responses_are_opposites():
    scores = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert group_advantages(scores, cu(2), kind="dr_grpo").tolist() == [1.0, -1.0]
    assert group_advantages(scores, cu(2), kind="rloo").tolist() == [2.0, -2.0]
    assert group_advantages(scores, cu(2)).tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_and_groups_of_one_give_exactly_0(kind):
    for dtype in (torch.float32, torch.float64):
        scores = torch.tensor([0.1, *[0.3] * 7, *[1 / 3] * 49], dtype=dtype)
        assert not group_advantages(scores, cu(1, 7, 0, 49), kind=kind).any()


@pytest.mark.parametrize("kind", KINDS)
def test_groups_do_not_see_each_other_and_nan_stays_in_its_own(kind):
    scores = torch.randn(12)
    together = group_advantages(scores, cu(5, 7), kind=kind)
    assert torch.equal(together[5:], group_advantages(scores[5:], cu(7), kind=kind))
    scores[2] = float("nan")
    assert group_advantages(scores, cu(5, 7), kind=kind).isnan().tolist() == [True] * 5 + [False] * 7


def test_a_large_mean_does_not_eat_the_differences():
    scores = 1e6 + torch.tensor([0.0, 1.0, 2.0, 3.0])
    expected = torch.tensor([-1.5, -0.5, 0.5, 1.5]) / (5 / 3) ** 0.5
    torch.testing.assert_close(group_advantages(scores, cu(4)), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"scores": torch.zeros(2, 2)}, ValueError, "scores must be (N,) = (*,), got (2, 2)"),
        ({"scores": torch.zeros(4, dtype=torch.int64)}, TypeError, "scores must be float32, float64, got int64"),
        ({"scores": torch.zeros(4, requires_grad=True)}, ValueError, "scores gets no gradient"),
        ({"cu_groups": torch.tensor([0, 3], dtype=torch.int32)}, ValueError, "cu_groups must rise from 0 to 4"),
        ({"cu_groups": torch.tensor([0, 4])}, TypeError, "cu_groups must be int32, got int64"),
        ({"kind": "ppo"}, ValueError, "kind must be one of grpo, dr_grpo, rloo, got 'ppo'"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error) as caught:
        group_advantages(**{"scores": torch.zeros(4), "cu_groups": cu(4), **change})
    assert "group_advantages: " in str(caught.value) and text in str(caught.value)


def test_scores_that_differ_by_rounding_have_no_variance():
    """Of any size and sign: a few last bits are no reason to push; a difference that means something is kept."""
    for value in (0.3, -7.7, 1e5, 3e-5):
        for dtype in (torch.float32, torch.float64):
            scores = torch.full((8,), value, dtype=dtype)
            scores[1] = torch.nextafter(scores[0], torch.tensor(torch.inf, dtype=dtype))
            scores[2] = torch.nextafter(scores[0], torch.tensor(-torch.inf, dtype=dtype))
            assert not group_advantages(scores, cu(8)).any()
            assert not group_advantages_ref(scores, cu(8), 1, 1e-6).any()
            assert group_advantages(scores, cu(8), kind="rloo").abs().max() <= 4 * torch.finfo(dtype).eps * abs(value)
            scores[1] = value * (1 + 1000 * torch.finfo(dtype).eps)
            deviation = statistics.stdev(scores.tolist())
            expected = (scores.double() - statistics.fmean(scores.tolist())) / (deviation + 1e-12)
            actual = group_advantages(scores, cu(8), eps=1e-12)
            torch.testing.assert_close(actual, expected.to(dtype), rtol=1e-3, atol=1e-3)
    assert group_advantages(torch.tensor([1.0, math.nan, 1.0]), cu(3)).isnan().all()
    assert group_advantages(torch.tensor([1e-9, 0.0, 0.0]), cu(3), eps=1e-12).abs().max() > 1  # about a mean of 0
