"""The losses of a reward model against their formulas in float64, and what is told of held-out rows."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

from fastrlhf.data import Labelled, Pair, Ranking, Rated
from fastrlhf.errors import DataError
from fastrlhf.settings.training import RewardConfig
from fastrlhf.stats.accuracy import wilson_interval
from fastrlhf.trainers.objectives import make_objective

PAIRS = [
    Pair([1], [2], [3], margin=0.3, weight=2.0, preference=0.8),
    Pair([1], [2], [3], preference=0.0),
    Pair([1], [2], [3], weight=0.0),
    Pair([1], [2], [3], preference=0.5),
]
RANKINGS = [
    Ranking([1], [[2], [3], [4]], [0, 1, 2]),
    Ranking([1], [[2], [3], [4], [5]], [0, 0, 1, 1]),
    Ranking([1], [[2], [3]], [0, 0]),
]
LABELLED = [Labelled([1], [2], 1.0), Labelled([1], [2], 0.0, weight=0.5), Labelled([1], [2], 0.3)]
RATED = [
    Rated([1], [2], {"a": 3.0, "b": 0.0}),
    Rated([1], [2], {"a": 1.0}),
    Rated([1], [2], {"a": 5.0, "b": 1.0}),
]


def made(name, rows, **options):
    return make_objective(name, RewardConfig(model="m", data="d", output="o", objective=name, **options), rows, [])


def log_sigmoid(x):
    return -torch.log(1 + torch.exp(-x))


def pairs_by_hand(scores, rows, smoothing=0.0, center=0.0):
    total = 0
    for row, (good, bad) in zip(rows, scores[:, 0].view(-1, 2), strict=True):
        p = (1 - smoothing) * row.preference + smoothing * (1 - row.preference)
        h = good - bad - row.margin
        entropy = -p * log_sigmoid(h) - (1 - p) * log_sigmoid(-h)
        total += row.weight * (entropy + center * (good + bad) ** 2)
    return total


def all_pairs_by_hand(scores, rows, ties="skip"):
    total = 0
    for row, own in zip(rows, scores[:, 0].split([len(row.ranks) for row in rows]), strict=True):
        terms = []
        for i, j in itertools.combinations(range(len(own)), 2):
            if row.ranks[i] != row.ranks[j]:
                terms.append(-log_sigmoid(own[i] - own[j]))
            elif ties == "half":
                terms.append(-0.5 * log_sigmoid(own[i] - own[j]) - 0.5 * log_sigmoid(own[j] - own[i]))
        total += sum(terms) / len(terms) if terms else 0
    return total


def plackett_luce_by_hand(scores, rows):
    """Minus log of the probability to draw each response among those that are not better."""
    total = 0
    for row, own in zip(rows, scores[:, 0].split([len(row.ranks) for row in rows]), strict=True):
        for i, rank in enumerate(row.ranks):
            rivals = torch.stack([s for s, other in zip(own, row.ranks, strict=True) if other >= rank])
            total += -torch.log(torch.exp(own[i]) / torch.exp(rivals).sum())
    return total


def outcome_by_hand(scores, rows):
    logs = [(row, log_sigmoid(s), log_sigmoid(-s)) for row, s in zip(rows, scores[:, 0], strict=True)]
    return sum(-row.weight * (row.label * yes + (1 - row.label) * no) for row, yes, no in logs)


def ratings_by_hand(scores, rows):
    total = 0
    deviations = {"a": math.sqrt(8 / 3), "b": 0.5}
    for row, own in zip(rows, scores, strict=True):
        errors = [((own["ab".index(k)] - v) / deviations[k]) ** 2 for k, v in row.ratings.items()]
        total += sum(errors) / len(errors)
    return total


CASES = {
    "pairs": (PAIRS, {}, pairs_by_hand),
    "pairs, smoothed and centred": (
        PAIRS,
        {"label_smoothing": 0.1, "center_coef": 0.2},
        lambda scores, rows: pairs_by_hand(scores, rows, 0.1, 0.2),
    ),
    "all_pairs": (RANKINGS, {}, all_pairs_by_hand),
    "all_pairs, ties half": (RANKINGS, {"ties": "half"}, lambda scores, rows: all_pairs_by_hand(scores, rows, "half")),
    "plackett_luce": (RANKINGS, {}, plackett_luce_by_hand),
    "outcome": (LABELLED, {}, outcome_by_hand),
    "ratings": (RATED, {}, ratings_by_hand),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_formula_in_float64(case):
    rows, options, by_hand = CASES[case]
    objective = made(case.partition(",")[0], rows, **options)
    torch.manual_seed(0)
    num_heads = max(len(objective.heads), 1)
    shape = sum(len(row.responses) for row in rows), num_heads
    scores = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours, stats = objective.loss(scores, rows, 7)
    theirs = by_hand(scores, rows) / 7
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert gradcheck(lambda x: objective.loss(x, rows, 7)[0], scores)
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize("case", CASES)
def test_losses_of_parts_add_up_and_a_part_of_no_rows_adds_nothing(case):
    rows, options, _ = CASES[case]
    objective = made(case.partition(",")[0], rows, **options)
    torch.manual_seed(0)
    scores = torch.randn(sum(len(row.responses) for row in rows), max(len(objective.heads), 1), requires_grad=True)
    whole, _ = objective.loss(scores, rows, len(rows))
    parts = scores.split([len(row.responses) for row in rows])
    each = [objective.loss(part, [row], len(rows))[0] for part, row in zip(parts, rows, strict=True)]
    none, _ = objective.loss(scores[:0], [], len(rows))
    torch.testing.assert_close(sum(each) + none, whole)
    assert none.item() == 0 and none.requires_grad


def test_each_row_trains_its_own_head():
    rows = [Pair([1], [2], [3], head="kind"), Pair([1], [2], [3], head="harmless")]
    objective = made("pairs", rows)
    assert objective.heads == ("harmless", "kind")
    scores = torch.randn(4, 2, requires_grad=True)
    objective.loss(scores, rows, 2)[0].backward()
    assert (scores.grad != 0).tolist() == [[False, True], [False, True], [True, False], [True, False]]


def test_held_out_pairs_are_counted_by_what_raters_preferred():
    """Ahead where it should be; behind as the raters say; a tie; and a pair of which nobody knows."""
    preferences, leads = (1.0, 0.2, 1.0, 0.5, 1.0), (1.0, -2.0, 0.0, 3.0, -1.0)
    rows = [Pair([1], [2], [3], preference=p) for p in preferences]
    scores = torch.tensor([x for lead in leads for x in (lead, 0.0)], dtype=torch.float64)[:, None]
    found = made("pairs", rows).evaluate(scores, rows)
    assert found["accuracy"] == 2.5 / 4 and (found["ties"], found["num_pairs"]) == (1, 4)


def test_held_out_rankings_count_pairs_of_different_rank_by_prompt():
    rows = RANKINGS[:2]
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0, 1.0, 0.0, -1.0], dtype=torch.float64)[:, None]
    found = made("all_pairs", rows).evaluate(scores, rows)
    assert found["accuracy"] == pytest.approx((2 / 3 + 3.5 / 4) / 2)
    assert (found["ties"], found["num_pairs"]) == (1, 7)


def test_held_out_labels_are_compared_with_the_commoner_one():
    rows = [Labelled([1], [2], label) for label in (1.0, 1.0, 0.0, 1.0, 0.5)]
    scores = torch.tensor([2.0, -1.0, -3.0, 0.0, 1.0], dtype=torch.float64)[:, None]
    found = made("outcome", rows).evaluate(scores, rows)
    assert (found["accuracy"], found["common"], found["num_labels"]) == (2.5 / 4, 0.75, 4)


def test_labels_of_one_prompt_that_agree_are_one_trial():
    """Four prompts, two always right and two never: as sure as two of four, though there are 40 labels."""
    rows = [Labelled([prompt], [2], 1.0) for prompt in range(4) for _ in range(10)]
    scores = torch.tensor([1.0 if row.prompt[0] < 2 else -1.0 for row in rows], dtype=torch.float64)[:, None]
    found = made("outcome", rows).evaluate(scores, rows)
    assert [found["accuracy_low"], found["accuracy_high"]] == pytest.approx(wilson_interval(0.5, 4))


def test_metrics_of_each_head_are_those_of_its_rows():
    rows = [Pair([1], [2], [3], head=name) for name in "aab"]
    scores = torch.tensor([[1, 0], [0, 9], [0, 0], [1, 0], [9, 1], [0, 2]], dtype=torch.float64)
    found = made("pairs", rows).evaluate(scores, rows)
    assert [found[key] for key in ("accuracy", "a/accuracy", "b/accuracy")] == pytest.approx([1 / 3, 0.5, 0])


def test_rows_that_do_not_say_which_head_they_are_for_are_refused():
    with pytest.raises(DataError, match=r"some rows have a head \(kind\) and others none"):
        made("pairs", [Pair([1], [2], [3], head="kind"), Pair([1], [2], [3])])
    rows = [Pair([1], [2], [3], head="kind")]
    config = RewardConfig(model="m", data="d", output="o")
    with pytest.raises(DataError, match="no row to train on has the head 'other' of a held-out row"):
        make_objective("pairs", config, rows, [Pair([1], [2], [3], head="other")])
    for here, there in ((None, "kind"), ("kind", None)):
        with pytest.raises(DataError, match=r"some rows have a head \(kind\) and others none"):
            make_objective("pairs", config, *([Pair([1], [2], [3], head=head)] for head in (here, there)))


@pytest.mark.parametrize("value", [3.0, 0.1])  # the mean of three times 0.1 is another number
def test_ratings_that_are_all_the_same_are_refused(value):
    with pytest.raises(DataError, match="all ratings of 'a' are the same"):
        made("ratings", [Rated([1], [2], {"a": value, "b": float(n)}) for n in range(3)])


def test_an_attribute_named_rating_is_one_of_several_where_others_are_rated_too():
    rows = [Rated([1], [2], {"rating": 1.0}), Rated([1], [2], {"rating": 2.0, "a": 0.0}), Rated([1], [2], {"a": 1.0})]
    assert made("ratings", rows).heads == ("a", "rating")
    assert made("ratings", [*rows[:1], Rated([1], [2], {"rating": 2.0})]).heads == ()


def test_a_ranking_of_equals_counts_one_half_in_the_accuracy_of_a_step():
    scores = torch.tensor([[0.0], [2.0], [3.0], [1.0], [0.0]])
    rows = [RANKINGS[2], RANKINGS[0]]
    for ties in ("skip", "half"):
        _, stats = made("all_pairs", rows, ties=ties).loss(scores, rows, 2)
        assert (stats["accuracy"], stats["margin"]) == ((0.5 + 1) / 2, (0 + 2) / 2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"objective": "outcomes"}, "objective must be one of .*did you mean outcome"),
        ({"objective": "outcome", "label_smoothing": 0.1}, "label_smoothing has no effect on objective outcome"),
        ({"objective": "plackett_luce", "ties": "half"}, "ties has no effect on objective plackett_luce"),
        ({"objective": "ratings", "center_data": "x"}, "center_data has no effect on objective ratings"),
        ({"objective": "pairs", "center_data": "x", "center_bias": False}, "center_data needs center_bias"),
        ({"eval_every": 5}, r"eval_every \(5\) needs held-out rows"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        RewardConfig(model="m", data="d", output="o", **changes)
