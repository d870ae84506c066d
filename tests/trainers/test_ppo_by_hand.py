"""Rewards, advantages, losses and gradients of a PPO step against float64 code written from the papers' formulas.

The responses differ in length, so padding that counts would show; some were cut off; the micro-batches are smaller
than the minibatch, so means of means would show; in the second update some tokens and values are clipped.
"""

import pytest
import torch
from ppo_by_hand import ByHand, assert_same_gradients, make_models, our_step, responses_of

from fastrlhf import PPOConfig

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (5, 1, 8, 3, 6, 2)
SETTINGS = {
    "kl_coef": 0.3,
    "gamma": 0.97,
    "lam": 0.9,
    "temperature": 0.7,
    "value_coef": 0.4,
    "entropy_coef": 0.02,
    "missing_eos": "subtract:0.5",
}


@pytest.fixture(scope="module", params=["k1", "k3"])
def steps(request, tmp_path_factory):
    folder = make_models(tmp_path_factory.mktemp("models"))
    rows, settings = responses_of(LENGTHS, eos=(5, 8, 2)), {**SETTINGS, "kl_estimator": request.param}
    by_hand = ByHand(folder, rows, PPOConfig(model="m", data="d", output="o", reward="r", **settings))
    return our_step(folder, rows, **settings), by_hand


def close(number):
    return pytest.approx(float(number), rel=1e-5, abs=1e-5)


def test_rewards_values_and_returns_are_those_of_the_formulas(steps):
    """Their means; that each token has its own, the gradients show."""
    metrics, by_hand = steps[0]["metrics"], steps[1]
    values, returns = torch.cat(by_hand.values), torch.cat(by_hand.returns)
    assert metrics["objective/scores"] == close(sum(by_hand.scores) / len(LENGTHS) + 0.5 * 3 / len(LENGTHS))
    assert metrics["objective/rlhf_reward"] == close(sum(map(sum, by_hand.rewards)) / len(LENGTHS))
    assert metrics["ppo/value/mean"] == close(values.mean()) and metrics["ppo/returns/mean"] == close(returns.mean())
    share = 1 - (returns - values).var() / returns.var()
    assert metrics["ppo/value/explained_variance"] == pytest.approx(share.item(), rel=1e-4, abs=1e-4)


def test_advantages_are_those_of_the_formulas_before_they_are_whitened(steps):
    metrics, by_hand = steps[0]["metrics"], steps[1]
    advantages = torch.cat(by_hand.returns) - torch.cat(by_hand.values)
    assert metrics["objective/advantages"] == close(advantages.mean())
    assert metrics["objective/advantages_std"] == close(advantages.std(correction=0))


def test_kl_is_summed_over_responses_of_both_signs_and_k3_is_of_the_same_direction(steps):
    ours, by_hand = steps
    ratios = torch.cat(by_hand.log_ratios)
    assert (ratios > 0).any() and (ratios < 0).any()
    assert ours["metrics"]["objective/kl"] == pytest.approx((-ratios).sum().item() / 6, abs=1e-5)
    assert ours["metrics"]["objective/kl_k3"] == pytest.approx((ratios.exp() - 1 - ratios).sum().item() / 6, abs=1e-5)


def test_gradients_of_another_formula_would_be_seen(steps):
    """A gradient that is off by a thousandth is not taken for right."""
    expected = steps[1].gradients["model"][0]
    with pytest.raises(AssertionError, match="e-0"):
        assert_same_gradients({name: 1.001 * gradient for name, gradient in expected.items()}, expected)


@pytest.mark.parametrize("update", [0, 1])
@pytest.mark.parametrize("model", ["model", "reward"])
def test_gradients_are_those_of_the_formulas(steps, model, update):
    ours, by_hand = steps
    assert len(ours[model]) == 2
    assert_same_gradients(ours[model][update], by_hand.gradients[model][update])


def test_losses_and_statistics_of_the_updates_are_means_over_response_tokens(steps):
    ours, by_hand = steps
    assert 0.1 < by_hand.clipped < 0.9 and 0.1 < by_hand.values_clipped < 0.9  # what the batch is for
    moves = by_hand.log_steps  # of the second update; those of the first are 0
    expected = {
        "ppo/policy/loss": sum(by_hand.losses["model"]) / 2,
        "ppo/value/loss": sum(by_hand.losses["reward"]) / 2,
        "ppo/policy/clip_fraction": by_hand.clipped / 2,
        "ppo/value/clip_fraction": by_hand.values_clipped / 2,
        "ppo/policy/approx_kl": (moves.exp() - 1 - moves).mean().item() / 2,
        "ppo/policy/ratio": (1 + moves.exp().mean().item()) / 2,
    }
    assert {name: ours["metrics"][name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
