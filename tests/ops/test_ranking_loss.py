"""Rankings: against every permutation, the pairwise loss and torch's own sampling without replacement."""

import itertools
import math

import pytest
import torch

from fastrlhf import pairwise_reward_loss, ranking_loss


def groups(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("kind", ["plackett_luce", "pairwise"])
def test_groups_of_two_are_the_pairwise_loss(kind):
    chosen, rejected = torch.randn(2, 30, dtype=torch.float64, requires_grad=True).unbind()
    scores = torch.stack([chosen, rejected], 1).flatten()
    loss, stats = ranking_loss(scores, groups(*[2] * 30), kind=kind)
    expected, expected_stats = pairwise_reward_loss(chosen, rejected)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats, {name: expected_stats[name] for name in stats})
    ours, theirs = (torch.autograd.grad(x, (chosen, rejected), retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_probabilities_of_all_orders_add_up_to_1(size):
    scores = torch.randn(size, dtype=torch.float64)
    orders = [scores[list(order)] for order in itertools.permutations(range(size))]
    losses = [ranking_loss(order, groups(size))[0].item() for order in orders]
    assert math.fsum(math.exp(-loss) for loss in losses) == pytest.approx(1, abs=1e-12)


def test_an_order_is_as_likely_as_drawing_it_without_replacement():
    scores = torch.tensor([0.3, -0.5, 1.0, 0.0])
    drawn = torch.multinomial(scores.softmax(0).expand(200_000, -1), 4)
    for order in ([2, 0, 3, 1], [1, 3, 0, 2], [0, 1, 2, 3]):
        loss, _ = ranking_loss(scores[order], groups(4))
        share = (drawn == torch.tensor(order)).all(1).double().mean().item()
        assert math.exp(-loss) == pytest.approx(share, abs=5 * math.sqrt(share / 200_000))


def test_pairwise_is_the_mean_over_pairs_then_over_groups():
    scores = torch.randn(9, dtype=torch.float64)
    loss, stats = ranking_loss(scores, groups(4, 0, 5), kind="pairwise")
    losses = []
    for group in (scores[:4], scores[4:]):
        pairs = torch.tensor(list(itertools.combinations(group.tolist(), 2)), dtype=torch.float64)
        losses.append(pairwise_reward_loss(pairs[:, 0], pairs[:, 1]))
    torch.testing.assert_close(loss, (losses[0][0] + losses[1][0]) / 2)
    for name in stats:
        torch.testing.assert_close(stats[name], (losses[0][1][name] + losses[1][1][name]) / 2)


@pytest.mark.parametrize("kind", ["plackett_luce", "pairwise"])
def test_the_order_within_a_tie_does_not_matter(kind):
    scores, ties = torch.randn(6, dtype=torch.float64), torch.tensor([False, False, True, True, False, True])
    results = []
    for order in ([0, 1, 2, 3, 4, 5], [0, 3, 1, 2, 5, 4], [0, 2, 3, 1, 4, 5]):
        leaf = scores[order].requires_grad_()
        loss, stats = ranking_loss(leaf, groups(6), kind=kind, ties=ties)
        loss.backward()
        results.append((loss, stats, torch.empty(6).double().index_copy(0, torch.tensor(order), leaf.grad)))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("kind", ["plackett_luce", "pairwise"])
def test_a_group_that_ties_throughout_wants_equal_scores(kind):
    leaf = torch.full((5,), 3.0, dtype=torch.float64, requires_grad=True)
    loss, stats = ranking_loss(leaf, groups(5), kind=kind, ties=torch.ones(5, dtype=torch.bool))
    loss.backward()
    torch.testing.assert_close(leaf.grad, torch.zeros(5).double())
    assert loss.item() == pytest.approx(5 * math.log(5) if kind == "plackett_luce" else math.log(2))
    assert stats["accuracy"] == 0.5 and stats["margin"] == 0


def test_a_tie_of_two_is_a_pair_with_target_one_half():
    scores = torch.tensor([1.3, -0.4])
    tie, half = torch.tensor([False, True]), torch.tensor([0.5])
    expected, _ = pairwise_reward_loss(scores[:1], scores[1:], targets=half)
    torch.testing.assert_close(ranking_loss(scores, groups(2), kind="pairwise", ties=tie)[0], expected)
    torch.testing.assert_close(ranking_loss(scores, groups(2), ties=tie)[0], 2 * expected)  # each draws once


@pytest.mark.parametrize("kind", ["plackett_luce", "pairwise"])
def test_micro_batches_with_the_number_of_groups_add_up(kind):
    scores, ties = torch.randn(9, dtype=torch.float64), torch.rand(9) < 0.4
    whole, whole_stats = ranking_loss(scores, groups(4, 5), kind=kind, ties=ties)
    parts = [
        ranking_loss(scores[s], groups(k), kind=kind, ties=ties[s], denominator=2)
        for s, k in ((slice(0, 4), 4), (slice(4, 9), 5))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for name in whole_stats:
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], whole_stats[name])


@pytest.mark.parametrize("kind", ["plackett_luce", "pairwise"])
def test_scores_gathered_at_last_tokens_give_the_loss_and_gradient_of_indexing(kind):
    tokens, last, ties = torch.randn(30, requires_grad=True), torch.tensor([29, 3, 17, 0, 8]), torch.rand(5) < 0.4
    loss, stats = ranking_loss(tokens, groups(3, 2), kind=kind, ties=ties, rows=last)
    expected, expected_stats = ranking_loss(tokens[last], groups(3, 2), kind=kind, ties=ties)
    assert torch.equal(loss, expected) and stats == expected_stats
    assert torch.equal(*(torch.autograd.grad(x, tokens)[0] for x in (loss, expected)))


@pytest.mark.parametrize("kind", ["plackett_luce", "pairwise"])
def test_scores_of_any_size_give_finite_losses_and_nan_is_shown(kind):
    leaf = torch.tensor([-3e4, 3e4, 0.0, 1e-3], requires_grad=True)
    loss, _ = ranking_loss(leaf, groups(4), kind=kind)
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all() and loss > 1e4
    loss, stats = ranking_loss(torch.tensor([1.0, torch.nan, 0.0]), groups(3), kind=kind)
    assert loss.isnan() and stats["accuracy"].isnan() and stats["margin"].isnan()


@pytest.mark.parametrize("kind", ["plackett_luce", "pairwise"])
@pytest.mark.parametrize("lengths", [(), (0,), (1, 0, 1)])
def test_nothing_to_rank_gives_0_that_can_be_differentiated(kind, lengths):
    leaf = torch.randn(sum(lengths), requires_grad=True)
    loss, stats = ranking_loss(leaf, groups(*lengths), kind=kind)
    loss.backward()
    assert loss == 0 and not leaf.grad.any() and not any(stats.values())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"scores": torch.zeros(4, 1)}, ValueError, "scores must be (N,)"),
        ({"scores": torch.zeros(4).long()}, TypeError, "scores must be float32, float64, got int64"),
        ({"cu_groups": groups(3)}, ValueError, "cu_groups must rise from 0 to 4, got [0, 3]"),
        ({"cu_groups": groups(4).long()}, TypeError, "cu_groups must be int32"),
        ({"rows": torch.tensor([0, 1, 2, 4])}, ValueError, "rows must be in [0, 4), got values from 0 to 4"),
        ({"rows": torch.tensor([0, 1, 1, 3])}, ValueError, "rows must name a row only once"),
        ({"rows": torch.arange(3)}, ValueError, "cu_groups must rise from 0 to 3"),
        ({"ties": torch.zeros(4)}, TypeError, "ties must be bool"),
        ({"ties": torch.zeros(3, dtype=torch.bool)}, ValueError, "ties (3,)"),
        ({"kind": "listwise"}, ValueError, "kind must be 'plackett_luce' or 'pairwise', got 'listwise'"),
        ({"denominator": 0}, ValueError, "denominator must be positive and finite, got 0"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error) as caught:
        ranking_loss(**{"scores": torch.zeros(4), "cu_groups": groups(2, 2), **change})
    assert "ranking_loss: " in str(caught.value) and text in str(caught.value)


def test_a_response_that_cannot_win_costs_no_number():
    """Of two that tie, one of score -inf: each is drawn against both, so the gradient is twice (1, 0) less (1, 1)."""
    scores = torch.tensor([-0.3, -torch.inf], requires_grad=True)
    loss, _ = ranking_loss(scores, groups(2), ties=torch.tensor([True, True]))
    assert loss.item() == math.inf
    assert torch.autograd.grad(loss, scores)[0].tolist() == [1.0, -1.0]


def test_a_rank_that_can_never_be_drawn_leaves_no_gradient_that_looks_right():
    scores = torch.tensor([0.3, 0.1, -torch.inf], requires_grad=True)
    loss, _ = ranking_loss(scores, groups(3))
    assert loss.isnan() and torch.autograd.grad(loss, scores)[0].isnan().all()
