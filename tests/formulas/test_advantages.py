"""Advantages and loss means against float64 loops over single tokens, written from the papers' formulas."""

import itertools
import math
from dataclasses import dataclass
from statistics import mean, pstdev, pvariance, stdev

import pytest
import torch

from fastrlhf import PPOConfig
from fastrlhf.formulas.advantages import token_weights
from fastrlhf.packing import pack
from fastrlhf.settings.ppo import ESTIMATORS, GROUPED
from fastrlhf.trainers.ppo.advantages import with_advantages

LENGTHS = (3, 1, 7, 4, 2, 5)  # of the responses; three to a prompt
KL = {"k1": lambda r: -r, "k2": lambda r: r * r / 2, "k3": lambda r: math.exp(r) - 1 - r}


def config(**changes):
    gamma = 1.0 if changes.get("estimator") in GROUPED else 0.9
    given = {"model": "m", "data": "d", "output": "o", "reward": "r", "batch_size": 6, "samples_per_prompt": 3}
    return PPOConfig(**{**given, "kl_coef": 0.3, "gamma": gamma, "lam": 0.8, "whiten": False, **changes})


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    packed = pack([[5] * (2 + n) for n in LENGTHS], prompt_lengths=[2] * len(LENGTHS))
    logprobs, ref_logprobs, values = torch.randn(3, sum(LENGTHS), generator=generator)
    prompts = torch.arange(len(LENGTHS)).div(3, rounding_mode="floor").repeat_interleave(torch.tensor(LENGTHS))
    return packed.with_fields(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, prompts=prompts)


SCORES = torch.tensor([1.0, -0.5, 2.0, 0.25, 0.0, -1.5])
GREEDY = torch.tensor([0.5, 0.5, 0.5, -1.0, -1.0, -1.0])


@dataclass
class Response:
    rewards: list[float]
    values: list[float]


def responses(batch, settings):
    """The token rewards and values of each response as Python numbers."""
    columns = [batch[name].double().tolist() for name in ("logprobs", "ref_logprobs", "values")]
    start, found = 0, []
    for length, score in zip(LENGTHS, SCORES.tolist(), strict=True):
        logprobs, ref_logprobs, values = (column[start : start + length] for column in columns)
        estimate = KL[settings.kl_estimator]
        kl = [estimate(q - p) for p, q in zip(logprobs, ref_logprobs, strict=True)]
        rewards = [0.0 if settings.kl_in == "loss" else -settings.kl_coef * x for x in kl]
        rewards[-1] += score
        found.append(Response(rewards, values))
        start += length
    if settings.whiten_rewards:
        every = [r for response in found for r in response.rewards]
        for response in found:
            response.rewards = [(r - mean(every)) / pstdev(every) + mean(every) for r in response.rewards]
    return found


def discounted(rewards, factor):
    return [sum(factor**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]


def expected_advantages(batch, settings):
    found, name = responses(batch, settings), settings.estimator
    if name == "gae":
        tokens = []
        for response in found:
            after = [*response.values[1:], 0.0]
            pairs = zip(response.rewards, response.values, after, strict=True)
            tokens += discounted([r + settings.gamma * n - v for r, v, n in pairs], settings.gamma * settings.lam)
    elif name in ("reinforce++", "remax"):
        baselines = GREEDY.tolist() if name == "remax" else [0.0] * len(found)
        tokens = [g - b for x, b in zip(found, baselines, strict=True) for g in discounted(x.rewards, settings.gamma)]
    else:
        totals, tokens = [sum(response.rewards) for response in found], []
        scores = SCORES.tolist()
        for n, length in enumerate(LENGTHS):
            first = n // 3 * 3
            group, paid = (values[first : first + 3] for values in (totals, scores))
            others = [x for i, x in enumerate(group) if i != n % 3]
            advantage = totals[n] - (mean(others) if name == "rloo" else mean(group))
            if name == "grpo":  # the KL's part of the total is not divided
                penalties = [total - score for total, score in zip(group, paid, strict=True)]
                advantage = (scores[n] - mean(paid)) / (stdev(paid) + 1e-6) + penalties[n % 3] - mean(penalties)
            tokens += [advantage] * length
    if settings.whiten and name in ("gae", "reinforce++", "reinforce++_baseline"):
        tokens = [(a - mean(tokens)) / pstdev(tokens) for a in tokens]
    return tokens


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(
    ("kl_estimator", "kl_in"), [("k1", "reward"), ("k2", "reward"), ("k3", "loss"), ("k3", "reward")]
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantages_are_those_of_the_papers(batch, estimator, kl_estimator, kl_in, whiten):
    settings = config(estimator=estimator, kl_estimator=kl_estimator, kl_in=kl_in, whiten=whiten)
    baseline = GREEDY if estimator == "remax" else None
    found, stats = with_advantages(settings, batch, SCORES, kl_coef=0.3, baseline=baseline)
    expected = torch.tensor(expected_advantages(batch, settings))
    torch.testing.assert_close(found["advantages"], expected, rtol=1e-5, atol=1e-5)
    rewards = mean(sum(response.rewards) for response in responses(batch, settings))
    assert stats["rewards"].item() == pytest.approx(rewards, rel=1e-5)


@pytest.mark.parametrize("estimator", ["gae", "reinforce++"])
def test_whitened_rewards_keep_their_mean(batch, estimator):
    settings = config(estimator=estimator, whiten_rewards=True)
    found, _ = with_advantages(settings, batch, SCORES, kl_coef=0.3)
    torch.testing.assert_close(
        found["advantages"], torch.tensor(expected_advantages(batch, settings)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_statistics_of_gae_are_those_before_whitening(batch, whiten_rewards):
    settings = config(whiten_rewards=whiten_rewards, whiten=True)
    _, stats = with_advantages(settings, batch, SCORES, kl_coef=0.3)
    advantages = expected_advantages(batch, config(whiten_rewards=whiten_rewards))
    returns = [a + v for a, v in zip(advantages, batch["values"].tolist(), strict=True)]
    expected = {
        "values": batch["values"].mean().item(),
        "returns": mean(returns),
        "advantages": mean(advantages),
        "advantages_std": pstdev(advantages),
        "explained_variance": 1 - pvariance(advantages) / pvariance(returns),
    }
    assert {name: stats[name].item() for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "reinforce++_baseline"])
@pytest.mark.parametrize("ulps", [0, 1, -2])
def test_equal_scores_give_no_advantage_by_default(batch, estimator, ulps):
    """Nor do scores that differ by rounding: GRPO and whitening would blow that up to the size of real differences."""
    scores = torch.full((6,), 4.0)
    scores[1] += ulps * (torch.nextafter(scores[1], scores.new_tensor(9.0)) - scores[1])
    settings = config(estimator=estimator, whiten=True)
    found, stats = with_advantages(settings, batch, scores, kl_coef=0.3)
    assert found["advantages"].abs().max() == 0 and stats["equal_groups"] == 1


def test_the_share_of_groups_with_equal_scores_is_told(batch):
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0, 1e-3, 0.0])
    _, stats = with_advantages(config(estimator="grpo"), batch, scores, kl_coef=0.3)
    assert stats["equal_groups"] == 0.5


@pytest.mark.parametrize("estimator", ["rloo", "dr_grpo"])
@pytest.mark.parametrize("scale", [9e-7, 1e-20])
def test_a_reward_on_a_small_scale_trains_as_one_on_a_large_scale_does(batch, estimator, scale):
    settings, scores = config(estimator=estimator), torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 0.0])
    large, _ = with_advantages(settings, batch, scores, kl_coef=0.0)
    small, stats = with_advantages(settings, batch, scale * scores, kl_coef=0.0)
    torch.testing.assert_close(small["advantages"] / scale, large["advantages"])
    assert large["advantages"].abs().max() > 0 and stats["equal_groups"] == 0.5


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo"])
def test_a_kl_in_the_reward_of_equal_scores_is_not_divided_by_its_deviation(batch, estimator):
    settings = config(estimator=estimator, kl_in="reward")
    found, _ = with_advantages(settings, batch, torch.ones(6), kl_coef=1e-3)
    kl = [x.sum().item() for x in (batch["logprobs"] - batch["ref_logprobs"]).double().split(LENGTHS)]
    means = [mean(kl[:3])] * 3 + [mean(kl[3:])] * 3
    expected = [-1e-3 * (k - m) for k, m, length in zip(kl, means, LENGTHS, strict=True) for _ in range(length)]
    torch.testing.assert_close(found["advantages"], torch.tensor(expected), rtol=1e-4, atol=1e-8)


def test_rloo_at_equal_scores_has_kl_coef_times_the_gradient_of_the_kl():
    """Exactly, in the mean over all groups of two one-token responses that a policy of four tokens can draw."""
    logits, reference = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double()
    logits.requires_grad_()
    logprobs, ref_logprobs = logits.log_softmax(0), reference.log_softmax(0)
    settings = config(estimator="rloo", samples_per_prompt=2)
    loss = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(range(4), repeat=2):
        drawn = logprobs[list(pair)]
        packed = pack([[5, token] for token in pair], prompt_lengths=[1, 1])
        fields = {"logprobs": drawn.detach(), "ref_logprobs": ref_logprobs[list(pair)]}
        packed = packed.with_fields(**fields)
        found, _ = with_advantages(settings, packed, torch.ones(2).double(), kl_coef=0.3)
        probability = drawn.detach().sum().exp()
        loss = loss - probability * (found["advantages"] * drawn).mean()
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (of_kl,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref_logprobs)).sum(), logits)
    torch.testing.assert_close(gradient, 0.3 * of_kl)


@pytest.mark.parametrize("loss_mean", ["tokens", "max_length"])
def test_an_unknown_mean_and_one_without_its_length_are_refused(batch, loss_mean):
    with pytest.raises(ValueError, match="no mean"):
        token_weights(batch.cu_responses, batch["prompts"], loss_mean=loss_mean)


def test_weights_turn_the_mean_over_tokens_into_the_mean_asked_for(batch):
    losses = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(1)).double()
    by_response = losses.split(LENGTHS)
    expected = {
        "token": losses.mean(),
        "sequence": torch.stack([x.mean() for x in by_response]).mean(),
        "prompt": torch.stack([torch.cat(by_response[:3]).mean(), torch.cat(by_response[3:]).mean()]).mean(),
        "max_length": losses.sum() / (6 * 16),
    }
    for name, value in expected.items():
        weights = token_weights(batch.cu_responses, batch["prompts"], loss_mean=name, max_new_tokens=16)
        assert (weights * losses).mean().item() == pytest.approx(value.item(), rel=1e-6), name
