import math

import numpy as np
import pytest
import torch

from fastrlhf.stats.correlation import correlation_interval, paired_pearson, paired_spearman, pearson, ranks, spearman


@pytest.fixture
def columns():
    generator = np.random.default_rng(0)
    x = generator.integers(0, 20, 100)
    return torch.tensor(x), torch.tensor(x + generator.normal(0, 9, 100))


def test_pearson_is_numpys(columns):
    assert pearson(*columns) == pytest.approx(np.corrcoef(*columns)[0, 1])


def test_ranks_count_who_is_below_and_half_of_who_is_equal(columns):
    values = columns[0].tolist()
    by_hand = [sum(v < value for v in values) + (values.count(value) + 1) / 2 for value in values]
    assert ranks(columns[0]).tolist() == by_hand


def test_spearman_sees_order_alone(columns):
    x, y = columns
    by_hand = np.corrcoef(ranks(x), ranks(y))[0, 1]
    assert spearman(x, y) == pytest.approx(by_hand)
    assert spearman(x.exp2(), y**3) == pytest.approx(by_hand)
    assert spearman(torch.tensor([1, 2, 3]), torch.tensor([1, 8, 9])) == 1


def test_within_pairs_it_does_not_matter_which_response_is_taken_off_the_other(columns):
    x, y = columns[0].double() - 7, columns[1] - 9
    both = torch.cat([x, -x]), torch.cat([y, -y])
    assert paired_pearson(x, y) == pytest.approx(np.corrcoef(*both)[0, 1])
    signs = torch.where(torch.arange(100) % 3 == 0, -1.0, 1.0)
    assert paired_pearson(x * signs, y * signs) == pytest.approx(paired_pearson(x, y))
    assert paired_spearman(x * signs, y * signs) == pytest.approx(paired_spearman(x, y))


def test_of_a_constant_there_is_no_correlation():
    assert math.isnan(pearson(torch.ones(5), torch.arange(5)))
    assert all(map(math.isnan, correlation_interval(math.nan, 5)))


@pytest.mark.parametrize(("correlate", "by_rank"), [(pearson, False), (spearman, True)])
def test_the_interval_holds_the_truth_in_95_of_100_files(correlate, by_rank):
    """Of two normal variables with r = 0.5; by rank the truth is 6 / pi asin(r / 2)."""
    generator, r = np.random.default_rng(1), 0.5
    truth = 6 / math.pi * math.asin(r / 2) if by_rank else r
    inside = 0
    for _ in range(600):
        x, noise = torch.tensor(generator.normal(size=(2, 50)))
        low, high = correlation_interval(correlate(x, r * x + math.sqrt(1 - r * r) * noise), 50, by_rank=by_rank)
        inside += low < truth < high
    assert inside / 600 == pytest.approx(0.95, abs=0.025)


def test_few_rows_say_nothing():
    assert correlation_interval(0.9, 3) == (-1, 1)
    assert correlation_interval(1.0, 10) == (1, 1)
