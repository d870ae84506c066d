import math

import numpy as np
import pytest
import torch

from fastrlhf.stats.drift import drift, js_terms, ks_statistic


def prompts(num, *, seed, tokens=40, longest=30, first=0):
    generator = np.random.default_rng(seed)
    return [(first + generator.integers(0, tokens, generator.integers(1, longest))).tolist() for _ in range(num)]


def test_divergence_is_that_of_entropies():
    """H((p + q) / 2) - (H(p) + H(q)) / 2, bits."""
    p, q = torch.tensor([5, 0, 3, 2]), torch.tensor([1, 4, 0, 15])

    def entropy(share):
        return -sum(x * math.log2(x) for x in share.tolist() if x)

    shares = p / p.sum(), q / q.sum()
    expected = entropy(sum(shares) / 2) - (entropy(shares[0]) + entropy(shares[1])) / 2
    assert js_terms(p, q).sum().item() == pytest.approx(expected, rel=1e-5)
    assert js_terms(p, 2 * p).sum().item() == pytest.approx(0, abs=1e-12)
    assert js_terms(torch.tensor([3, 0]), torch.tensor([0, 7])).sum().item() == pytest.approx(1)


def test_the_largest_gap_of_distribution_functions_by_hand():
    x, y = torch.tensor([1, 1, 4, 9]), torch.tensor([1, 5, 6])
    gaps = [abs((x <= at).float().mean() - (y <= at).float().mean()).item() for at in range(11)]
    assert ks_statistic(x, y).item() == pytest.approx(max(gaps))


def test_p_values_of_one_distribution_are_uniform_and_those_of_two_small():
    results = [drift(prompts(30, seed=n), prompts(40, seed=1000 + n), num_permutations=19) for n in range(60)]
    for name in ("divergence_p", "lengths_p"):
        values = np.array([getattr(result, name) for result in results])
        for level in (0.1, 0.5, 0.9):
            assert (values <= level).mean() == pytest.approx(level, abs=0.2), name
    words = drift(prompts(30, seed=0), prompts(40, seed=1, first=20), num_permutations=99)
    assert words.divergence_p == 0.01 and words.lengths_p > 0.05
    assert words.divergence > 3 * words.divergence_by_chance
    lengths = drift(prompts(40, seed=0), prompts(40, seed=1, longest=80), num_permutations=99)
    assert lengths.lengths_p == 0.01


def test_p_values_are_right_where_both_sets_hold_the_same_prompts():
    """200 times two sets of 20 and 30 prompts out of 33; `python -m benchmarks.coverage` has 500 of more kinds."""
    population = prompts(33, seed=5)
    generator = np.random.default_rng(0)
    found = []
    for n in range(200):
        first, second = (generator.choice(len(population), size, replace=False) for size in (20, 30))
        sets = ([population[row] for row in rows] for rows in (first, second))
        found.append(drift(*sets, num_permutations=19, seed=n))
    assert np.mean([result.shared * 30 / 20 for result in found]) == pytest.approx(0.9, abs=0.05)
    for level in (0.05, 0.1, 0.25, 0.5):
        error = math.sqrt(level * (1 - level) / 200)
        assert np.mean([result.divergence_p <= level for result in found]) == pytest.approx(level, abs=3 * error)
        size = np.mean([result.lengths_p <= level for result in found])  # equal values make it less than its level
        assert level / 3 - 3 * error < size < level + 3 * error


def test_a_difference_shows_beside_prompts_of_both_sets():
    both = prompts(20, seed=2)
    words = drift([*both, *prompts(30, seed=0)], [*both, *prompts(40, seed=1, first=20)], num_permutations=99)
    assert words.divergence_p == 0.01 and words.num == (50, 60)
    inside = drift([*both, *prompts(30, seed=0, first=20)], both, num_permutations=19)
    assert (inside.divergence_p, inside.lengths_p, inside.shared) == (1, 1, 1)


def test_the_tokens_that_differ_are_named_with_their_shares():
    result = drift([[1, 2], [2, 2, 1]], [[1, 7], [7, 7, 1], [1]], num_permutations=9)
    assert {token for token, *_ in result.tokens[:2]} == {2, 7}
    assert dict((token, shares) for token, *shares in result.tokens)[7] == pytest.approx([0, 0.5])


def test_prompts_of_both_sets_are_counted_and_a_set_is_like_itself():
    own = prompts(20, seed=3)
    half = drift(own, [*own[:10], *prompts(10, seed=4)], num_permutations=9)
    assert half.shared == 0.5
    same = drift(own, own + own, num_permutations=19)
    assert (same.divergence, same.divergence_p, same.lengths, same.shared) == (0, 1, 0, 1)
    assert same.num == (20, 20)


def test_large_sets_are_drawn_from():
    result = drift(prompts(50, seed=0), prompts(60, seed=1), max_prompts=15, num_permutations=9)
    assert result.num == (15, 15)


@pytest.mark.parametrize(("sets", "message"), [(([], [[1]]), "no prompts"), (([[]], [[]]), "all prompts are empty")])
def test_what_cannot_be_compared_is_refused(sets, message):
    with pytest.raises(ValueError, match=message):
        drift(*sets)
