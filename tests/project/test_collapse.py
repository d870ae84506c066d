"""What is called a collapse, and the KL that the toy's is measured by."""

from math import comb, exp, log

import pytest

from benchmarks.collapse import GOOD, LENGTH, VOCAB, collapse, main, read, toy_target, write

START = {"seed": 0, "step": 0, "gold": 0.5, "gold_error": 0.1}
FIRST = {"seed": 0, "step": 1, "kl": 0.0, "entropy": 2.0}


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ({"gold": 0.6, "kl": 2.9, "entropy": 0.21}, None),
        ({"gold": 0.49, "kl": 2.9, "entropy": 0.21}, "the gold score fell from 0.500 to 0.490"),
        ({"gold": 0.6, "kl": 3.1, "entropy": 0.21}, "the KL is 3.10, its target 1.00"),
        ({"gold": 0.6, "kl": 2.9, "entropy": 0.19}, "the entropy fell from 2.000 to 0.190"),
    ],
)
def test_a_collapse_is_a_lower_gold_score_a_tenth_of_the_entropy_or_thrice_the_kl(tmp_path, last, words):
    rows = [START, FIRST, {"seed": 0, "step": 2, **last}]
    assert collapse(rows, target=1.0) == words
    write(tmp_path / "runs/toy.csv", {0: rows})
    assert collapse(read(tmp_path / "runs/toy.csv")[0], target=1.0) == words


def log_mean_exp_score(kl_coef):
    """log E exp(score / kl_coef) of a uniform policy, by the number of tokens before the end and of good ones among
    them."""
    total = 0.0
    for length in range(LENGTH + 1):
        chance = (1 / VOCAB) if length < LENGTH else 1.0  # of the end there, given that it was not drawn before
        for good in range(length + 1):
            ways = comb(length, good) * (GOOD / VOCAB) ** good * ((VOCAB - GOOD - 1) / VOCAB) ** (length - good)
            total += chance * ways * exp(good / LENGTH / kl_coef)
    return log(total)


@pytest.mark.parametrize("kl_coef", [0.02, 0.05, 1.0])
def test_the_target_of_the_toy_is_the_kl_of_the_best_policy(kl_coef):
    """The best policy is the start tilted by exp(score / c), of KL -d/dc (c log E exp(score / c))."""
    step = 1e-5 * kl_coef
    above, below = ((kl_coef + h) * log_mean_exp_score(kl_coef + h) for h in (step, -step))
    assert toy_target(kl_coef) == pytest.approx((below - above) / (2 * step), rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_toy_does_not_collapse(tmp_path, capsys):
    assert main(["toy", "--seeds", "1", "--into", str(tmp_path)]) == 0
    assert "seed 0: " in capsys.readouterr().out and (tmp_path / "toy.svg").read_text().startswith("<?xml")
    before = (tmp_path / "toy.csv").read_bytes()
    assert main(["toy", "--seeds", "1", "--into", str(tmp_path)]) == 0 and (tmp_path / "toy.csv").read_bytes() == before
