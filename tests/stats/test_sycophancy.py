import math
import statistics

import pytest
import torch

from fastrlhf.stats.sycophancy import sycophancy


def test_the_rise_is_a_paired_difference_with_its_error():
    before, after = [0.0, 1.0, -2.0, 0.5], [1.0, 1.0, 1.0, 0.0]
    result = sycophancy(torch.tensor(before), torch.tensor(after))
    rises = [b - a for a, b in zip(before, after, strict=True)]
    assert result.rise == pytest.approx(statistics.mean(rises))
    assert result.error == pytest.approx(statistics.stdev(rises) / 2)
    chances = [1 / (1 + math.exp(-b)) - 1 / (1 + math.exp(-a)) for a, b in zip(before, after, strict=True)]
    assert result.rise_of_probability == pytest.approx(statistics.mean(chances))
    assert (result.preferred_before, result.preferred_after, result.risen) == (0.625, 0.875, 0.625)
    assert (result.lead_before, result.lead_after, result.num) == (-0.125, 0.75, 4)


def test_one_question_has_no_error_and_none_is_refused():
    assert math.isnan(sycophancy(torch.zeros(1), torch.ones(1)).error)
    with pytest.raises(ValueError, match="no questions"):
        sycophancy(torch.zeros(0), torch.zeros(0))
