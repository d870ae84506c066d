import itertools
import math
import random

import numpy as np
import pytest
import torch
from compare import filled

from fastrlhf.stats.accuracy import accuracy, effective_num, hits, is_right, number, quantile_bins, wilson_interval


def test_wilson_interval_is_where_the_score_test_rejects():
    """Its ends p0 solve |p - p0| = z sqrt(p0 (1 - p0) / n)."""
    for share, num in ((0.5, 100), (0.71, 100), (1.0, 12), (0.0, 7)):
        for end in filled(wilson_interval(share, num)):
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(max(end * (1 - end), 0) / num), abs=1e-9)


def test_scores_that_are_none_agree_with_nothing():
    result = accuracy(torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 0.0]))
    assert math.isnan(result.accuracy) and math.isnan(result.low) and math.isnan(result.high) and result.ties == 0
    assert is_right(torch.tensor([math.nan, 2.0, 0.0])).isnan().tolist() == [True, False, False]


def test_ties_count_half_and_calibration_takes_soft_labels_by_their_weight():
    margins = torch.tensor([2.0, -1.0, 0.0, 3.0])
    assert hits(margins).tolist() == [1, 0, 0.5, 1]
    assert hits(margins, torch.tensor([0.9, 0.9, 0.9, 0.0])).tolist() == pytest.approx([0.9, 0.1, 0.5, 0])
    result = accuracy(margins)
    assert (result.accuracy, result.ties, result.num, result.effective_num) == (0.625, 1, 4, 4)
    assert (result.low, result.high) == wilson_interval(0.625, 4)


def test_the_same_judgements_written_the_other_way_round_have_the_same_accuracy():
    """Any pairs turned round: -d and 1 - y. What is likelier is what is right; of 1/2 nothing is."""
    generator = torch.Generator().manual_seed(0)
    margins = torch.randint(-2, 3, (200,), generator=generator).double()
    labels = torch.randint(0, 5, (200,), generator=generator) / 4
    clusters = torch.randint(0, 60, (200,), generator=generator).tolist()
    turned = torch.rand(200, generator=generator) < 0.5
    found = accuracy(margins, labels, clusters=clusters)
    assert found == accuracy(
        torch.where(turned, -margins, margins), torch.where(turned, 1 - labels, labels), clusters=clusters
    )
    by_hand = [
        0.5 if d == 0 else float((d > 0) == (y > 0.5))
        for d, y in zip(margins.tolist(), labels.tolist(), strict=True)
        if y != 0.5
    ]
    assert (found.accuracy, found.num) == (pytest.approx(sum(by_hand) / len(by_hand)), len(by_hand))
    undecided = accuracy(margins, torch.full((200,), 0.5))
    assert (undecided.accuracy, undecided.low, undecided.high, undecided.num) == (0.5, 0, 1, 0)


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="accuracy: there are no pairs"):
        accuracy(torch.zeros(0))


def test_copies_of_a_pair_are_worth_one_trial():
    margins = torch.randn(40, generator=torch.Generator().manual_seed(0))
    once = accuracy(margins)
    thrice = accuracy(margins.repeat(3), clusters=[*range(40)] * 3)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    assert (thrice.num, thrice.num_clusters) == (120, 40)
    assert thrice.effective_num == pytest.approx(40)


def test_pairs_that_are_all_right_are_worth_as_many_trials_as_there_are_prompts():
    assert effective_num(torch.ones(12), torch.arange(12) % 3) == 3


def test_pairs_on_one_prompt_are_worth_one_trial():
    assert effective_num(torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3, dtype=torch.int64)) == 1
    assert effective_num(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1])) == 2
    assert effective_num(torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])) == 4


def test_the_interval_of_clustered_pairs_holds_the_truth_in_95_of_100_files():
    """400 files of 60 prompts with 5 pairs each, right with a probability that differs by prompt: 0.2 or 0.9."""
    generator = np.random.default_rng(0)
    inside = naive = 0
    for _ in range(400):
        chances = generator.choice([0.2, 0.9], 60).repeat(5)
        margins = torch.tensor(np.where(generator.random(300) < chances, 1.0, -1.0))
        result = accuracy(margins, clusters=np.arange(60).repeat(5).tolist())
        inside += result.low < 0.55 < result.high
        low, high = wilson_interval(result.accuracy, 300)
        naive += low < 0.55 < high
    assert inside / 400 == pytest.approx(0.95, abs=0.025)
    assert naive / 400 < 0.85


@pytest.mark.parametrize("right", [[1.0, 1.0, -1.0, -1.0, 1.0, 1.0], [1.0] * 6])
def test_a_weight_is_how_often_a_pair_counts(right):
    """A pair of weight 3 is one that stands three times in the file, on its prompt; one of weight 0 is not there."""
    margins, counts = torch.tensor(right), torch.tensor([1, 2, 0, 3, 2, 2])
    weighted = accuracy(margins, weights=counts / 7)
    copied = accuracy(margins.repeat_interleave(counts), clusters=torch.arange(6).repeat_interleave(counts).tolist())
    assert weighted.accuracy == pytest.approx(copied.accuracy)
    assert (weighted.num, weighted.num_clusters) == (5, copied.num_clusters)
    if right[3] < 0:
        assert weighted.effective_num == pytest.approx(copied.effective_num)
    else:  # as many as the weights are worth: (sum of w)^2 / sum of w^2
        assert weighted.effective_num == pytest.approx(10**2 / (1 + 4 + 9 + 4 + 4))


def test_equal_weights_change_nothing():
    margins = torch.randn(60, generator=torch.Generator().manual_seed(1))
    clusters = [n // 3 for n in range(60)]
    assert accuracy(margins, clusters=clusters, weights=torch.full((60,), 0.5)) == accuracy(margins, clusters=clusters)


def test_names_are_numbered_as_they_appear():
    assert number(["b", "a", "b", None]).tolist() == [0, 1, 0, 2]


def test_bins_hold_all_rows_once_in_order_and_equal_values_together():
    rng = random.Random(0)
    for num_bins in (1, 3, 10):
        for size in (1, 2, 7, 100):
            values = torch.tensor([rng.randint(0, 12) for _ in range(size)])
            bins = quantile_bins(values, num_bins)
            assert sorted(row for b in bins for row in b.tolist()) == list(range(size))
            assert all(len(b) for b in bins) and len(bins) <= num_bins
            assert all(values[a].max() < values[b].min() for a, b in itertools.pairwise(bins))
    assert [len(b) for b in quantile_bins(torch.arange(100.0), 4)] == [25] * 4
    assert quantile_bins(torch.zeros(0), 4) == []
