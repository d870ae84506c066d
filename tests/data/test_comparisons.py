"""Judgements as pairs, by hand."""

import pytest

from fastrlhf.data import Labelled, Pair, Ranking, Rated
from fastrlhf.data.comparisons import comparisons


def test_a_ranking_makes_a_pair_of_each_two_responses_of_different_ranks():
    ranking = Ranking([9], [[1], [2], [3]], [0, 1, 1], head="kind", columns={"rater": "ann"})
    found = comparisons([ranking, Pair([8], [1], [2])])
    assert [(pair.chosen, pair.rejected) for pair in found] == [([1], [2]), ([1], [3]), ([1], [2])]
    assert found[0].head == "kind" and found[0].columns == {"rater": "ann"} and found[0].preference == 1


def test_labels_compare_responses_to_one_prompt():
    rows = [Labelled([9], [1], 0.8, columns={"id": 4, "n": 1}), Labelled([9], [2], 0.5, columns={"id": 4, "n": 2})]
    (pair,) = comparisons([*rows, Labelled([8], [3], 0.0), Labelled([9], [1], 0.8)][:3])
    assert (pair.prompt, pair.chosen, pair.rejected, pair.columns) == ([9], [1], [2], {"id": 4})
    # right and wrong: 0.8 * 0.5; wrong and right: 0.2 * 0.5
    assert pair.preference == pytest.approx(0.4 / (0.4 + 0.1))
    assert comparisons([Labelled([9], [1], 1.0), Labelled([9], [2], 1.0)]) == []
    assert comparisons([Labelled([9], [1], 0.0), Labelled([9], [2], 1.0)])[0].chosen == [2]
    assert comparisons([Labelled([9], [1], 0.0), Labelled([9], [1], 1.0)]) == []


def test_ratings_compare_by_each_attribute():
    rows = [Rated([9], [1], {"kind": 3.0, "short": 1.0}), Rated([9], [2], {"kind": 1.5, "short": 2.0})]
    found = {pair.head: (pair.chosen, pair.margin) for pair in comparisons(rows)}
    assert found == {"kind": ([1], 1.5), "short": ([2], 1.0)}
    names = [f"attribute {n}" for n in range(9)]
    many = comparisons([Rated([9], [n], dict.fromkeys(names, float(n))) for n in range(2)])
    assert [pair.head for pair in many] == names  # the same order in every run
    (alone,) = comparisons([Rated([9], [1], {"rating": 3.0}), Rated([9], [2], {"rating": 1.0})])
    assert alone.head is None
