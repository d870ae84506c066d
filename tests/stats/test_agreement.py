import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrlhf.stats.accuracy import accuracy
from fastrlhf.stats.agreement import Vote, agreement, ceiling, repeats, votes

A, B, C = [1, 2], [3], [4, 5, 6]


def test_an_item_is_a_prompt_with_two_responses_in_either_order():
    cast = votes([[9], [9], [8], [9]], [A, B, A, A], [B, A, B, C])
    assert [vote.item for vote in cast] == [0, 0, 1, 2]
    assert cast[0].side == -cast[1].side == cast[2].side
    cast = votes([[9]] * 3, [A, B, A], [B, A, B], heads=["helpful", "harmless", "helpful"])
    assert [vote.item for vote in cast] == [0, 1, 0]  # what is more helpful may well be less harmless


def test_a_label_below_half_is_a_vote_for_the_other_and_half_is_none():
    cast = votes([[9]] * 3, [A] * 3, [B] * 3, [0.9, 0.1, 0.5])
    assert cast[0].side == -cast[1].side != 0 == cast[2].side


def test_repeats_are_counted_by_what_they_say():
    prompts, chosen, rejected = [[9]] * 5 + [[8]], [A, A, B, A, C, A], [B, B, A, C, A, B]
    found = repeats(votes(prompts, chosen, rejected))
    # item A-B: two for A, of which one a duplicate, and one for B; item A-C: one each; the last alone
    assert (found.num_rows, found.num_items, found.duplicates, found.contradicted) == (6, 3, 1, 2)
    assert found.best_accuracy == pytest.approx((2 + 1 + 1) / 6)
    every = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)))  # what scores could say of the items
    labels = [0.6, 0.9, 0.8, 0.5, 0.7, 0.1]
    signs = torch.tensor([1, 1, -1, 1, -1, 1])
    best = max(accuracy(own[[0, 0, 0, 1, 1, 2]] * signs, torch.tensor(labels)).accuracy for own in every)
    assert repeats(votes(prompts, chosen, rejected, labels)).best_accuracy == pytest.approx(best)
    assert found.self_contradicted is None
    known = repeats(votes(prompts, chosen, rejected), ["ann", "bob", "ann", "ann", "bob", "bob"])
    assert (known.duplicates, known.contradicted, known.self_contradicted) == (0, 2, 1)


def test_agreement_is_the_share_of_pairs_of_raters_who_say_the_same():
    rng = random.Random(0)
    cast, raters, shares = [], [], []
    for item in range(40):
        sides = {name: rng.choice([1, 1, 1, -1]) for name in rng.sample("abcde", rng.randint(1, 4))}
        cast += [Vote(item, (side + 1) / 2) for side in sides.values()]
        raters += sides
        both = [(x, y) for x in sides for y in sides if x < y]
        if both:
            shares.append(sum(sides[x] == sides[y] for x, y in both) / len(both))
    result = agreement(cast, raters)
    assert result.agreement == pytest.approx(sum(shares) / len(shares))
    assert result.num_items == len(shares)
    assert result.kappa == pytest.approx(2 * result.agreement - 1)
    assert result.low < result.agreement < result.high


def test_a_raters_own_share_is_how_often_the_others_side_with_him():
    cast = [Vote(0, 1), Vote(0, 1), Vote(0, 0), Vote(1, 1), Vote(1, 0)]
    result = agreement(cast, ["ann", "bob", "cy", "ann", "cy"])
    assert result.raters == {"ann": (2, 0.25), "bob": (1, 0.5), "cy": (2, 0.0)}


def test_a_rater_agrees_with_others_not_with_himself():
    assert agreement([Vote(0, 1), Vote(0, 1)], ["ann", "ann"]) is None
    assert agreement([Vote(0, 1), Vote(0, 1)], [None, "ann"]) is None
    # he says both: no vote
    assert agreement([Vote(0, 1), Vote(0, 0), Vote(0, 1)], ["ann", "ann", "bob"]) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_the_best_accuracy_lies_between_agreement_and_ceiling(shares):
    """Items of which a share p of all raters prefers one response: two agree with p^2 + (1 - p)^2."""
    agree = sum(p * p + (1 - p) ** 2 for p in shares) / len(shares)
    best = sum(max(p, 1 - p) for p in shares) / len(shares)
    assert agree - 1e-9 <= best <= ceiling(agree) + 1e-7


def test_the_ceiling_is_reached_where_items_are_alike():
    assert ceiling(0.8**2 + 0.2**2) == pytest.approx(0.8)
    assert (ceiling(1), ceiling(0.5), ceiling(0.3)) == (1, 0.5, 0.5)
