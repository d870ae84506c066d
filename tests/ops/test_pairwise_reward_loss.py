"""The Bradley-Terry loss against torch's own losses, its closed forms and its limits."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf import pairwise_reward_loss


def test_it_is_the_logistic_loss_of_the_difference():
    chosen, rejected = torch.randn(2, 40)
    loss, _ = pairwise_reward_loss(chosen, rejected)
    torch.testing.assert_close(loss, F.soft_margin_loss(chosen - rejected, torch.ones(40)))


def test_equal_scores_give_log_2_and_count_as_half_right():
    loss, stats = pairwise_reward_loss(torch.ones(3), torch.tensor([1.0, 0.0, 2.0]))
    assert stats["accuracy"] == 0.5
    assert pairwise_reward_loss(torch.ones(3), torch.ones(3))[0].item() == pytest.approx(math.log(2))
    expected = {"margin": 0.0, "chosen": 1.0, "rejected": 1.0}
    assert {name: stats[name].item() for name in expected} == pytest.approx(expected)
    assert loss > math.log(2)


def test_soft_targets_are_binary_cross_entropy_and_smoothing_is_a_chance_of_a_wrong_label():
    chosen, rejected, targets = torch.randn(40), torch.randn(40), torch.rand(40)
    expected = F.binary_cross_entropy_with_logits(chosen - rejected, targets)
    torch.testing.assert_close(pairwise_reward_loss(chosen, rejected, targets=targets)[0], expected)
    smooth, _ = pairwise_reward_loss(chosen, rejected, label_smoothing=0.1)
    torch.testing.assert_close(smooth, pairwise_reward_loss(chosen, rejected, targets=torch.full((40,), 0.9))[0])


def test_swapping_the_responses_and_their_targets_changes_nothing():
    chosen, rejected, targets = torch.randn(40), torch.randn(40), torch.rand(40)
    loss, _ = pairwise_reward_loss(chosen, rejected, targets=targets, center_coef=0.1)
    swapped, _ = pairwise_reward_loss(rejected, chosen, targets=1 - targets, center_coef=0.1)
    torch.testing.assert_close(loss, swapped)


def test_a_margin_asks_for_that_much_more():
    chosen, rejected, margin = torch.randn(40), torch.randn(40), torch.rand(40)
    loss, stats = pairwise_reward_loss(chosen, rejected, margin=margin)
    torch.testing.assert_close(loss, pairwise_reward_loss(chosen - margin, rejected)[0])
    torch.testing.assert_close(stats["margin"], (chosen - rejected).mean())


def test_centring_adds_the_mean_square_of_the_sum():
    chosen, rejected = torch.randn(2, 40)
    plain, centred = (pairwise_reward_loss(chosen, rejected, center_coef=c)[0] for c in (0.0, 0.5))
    torch.testing.assert_close(centred - plain, 0.5 * (chosen + rejected).square().mean())


def test_a_weight_of_two_is_the_pair_twice():
    chosen, rejected = torch.randn(2, 4)
    weights = torch.tensor([2.0, 1.0, 0.0, 1.0])
    twice = torch.tensor([0, 0, 1, 3])
    loss, _ = pairwise_reward_loss(chosen, rejected, weights=weights)
    torch.testing.assert_close(loss, pairwise_reward_loss(chosen[twice], rejected[twice])[0])


def test_far_apart_scores_give_finite_losses_and_gradients():
    # log(1 + exp(r - c)), as OpenRLHF has it, is inf with NaN gradients from a difference of 89
    chosen = torch.tensor([-500.0, 500.0, 1e4], requires_grad=True)
    loss, _ = pairwise_reward_loss(chosen, torch.zeros(3))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(500.0 / 3))
    torch.testing.assert_close(chosen.grad, torch.tensor([-1 / 3, 0.0, 0.0]))


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_micro_batches_with_the_global_count_add_up(seed, size, cut):
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    whole, whole_stats = pairwise_reward_loss(chosen, rejected, center_coef=0.01)
    parts = [
        pairwise_reward_loss(chosen[s], rejected[s], center_coef=0.01, denominator=size)
        for s in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for name in whole_stats:
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], whole_stats[name])


def test_scores_gathered_at_last_tokens_give_the_loss_and_gradient_of_indexing():
    tokens, other = torch.randn(20, requires_grad=True), torch.randn(9, requires_grad=True)
    last, other_rows, options = torch.tensor([3, 11, 19]), torch.tensor([8, 0, 4]), {"center_coef": 0.1}
    for chosen, rejected, rows in ((tokens, tokens, last - 1), (tokens, other, other_rows)):
        leaves = [chosen] if chosen is rejected else [chosen, rejected]
        loss, stats = pairwise_reward_loss(chosen, rejected, chosen_rows=last, rejected_rows=rows, **options)
        expected, expected_stats = pairwise_reward_loss(chosen[last], rejected[rows], **options)
        assert torch.equal(loss, expected) and stats == expected_stats
        grads, expected_grads = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
        assert all(torch.equal(a, e) for a, e in zip(grads, expected_grads, strict=True))


def test_no_pair_gives_0_that_can_be_differentiated():
    chosen = torch.empty(0, requires_grad=True)
    loss, stats = pairwise_reward_loss(chosen, torch.empty(0))
    loss.backward()
    assert loss == 0 and chosen.grad.shape == (0,) and not any(stats.values())


def test_nan_is_shown_in_the_loss_and_every_statistic_of_it():
    loss, stats = pairwise_reward_loss(torch.tensor([1.0, float("nan")]), torch.zeros(2))
    assert loss.isnan() and stats["accuracy"].isnan() and stats["margin"].isnan() and stats["rejected"] == 0


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rejected": torch.zeros(3)}, ValueError, "chosen (4,) and rejected (3,)"),
        ({"chosen": torch.zeros(4, 1)}, ValueError, "chosen must be (N,)"),
        ({"margin": torch.zeros(3)}, ValueError, "chosen (4,) and margin (3,)"),
        ({"weights": torch.zeros(4).double()}, TypeError, "weights must be float32, got float64"),
        ({"targets": torch.full((4,), 1.5)}, ValueError, "targets must be in [0, 1], got values from 1.5 to 1.5"),
        ({"weights": torch.zeros(4, requires_grad=True)}, ValueError, "weights gets no gradient"),
        (
            {"chosen_rows": torch.tensor([0, 4, 1, 2])},
            ValueError,
            "chosen_rows must be in [0, 4), got values",
        ),
        ({"rejected_rows": torch.tensor([0, 1, 1, 2])}, ValueError, "rejected_rows must name a row only once"),
        ({"chosen_rows": torch.tensor([0, 1])}, ValueError, "chosen_rows (2,) and rejected (4,)"),
        ({"chosen_rows": torch.arange(4).int()}, TypeError, "chosen_rows must be int64, got int32"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in [0, 1], got 1.5"),
        ({"denominator": 0.0}, ValueError, "denominator must be positive and finite, got 0.0"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error) as caught:
        pairwise_reward_loss(**{"chosen": torch.zeros(4), "rejected": torch.zeros(4), **change})
    assert "pairwise_reward_loss: " in str(caught.value) and text in str(caught.value)
