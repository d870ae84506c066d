"""What a step tells, against numbers worked by hand, and each rule by which a run looks ill."""

import json
import re

import pytest
import torch
from tiny import tiny_tokenizer

from fastrlhf.generation.engine import Sample
from fastrlhf.packing import pack
from fastrlhf.runtime.metrics import MetricsLog, Statistics
from fastrlhf.trainers.ppo.diagnostics import HealthChecks, describe, diversity, rollout_difference, sample_rows


def sample(prompt, response, finished=True):
    return Sample(prompt, response, [0.0] * len(response), [0.0] * len(response), finished)


SAMPLES = [sample([7], [5, 6, 5, 6]), sample([7], [5, 6, 5, 6], False), sample([8], [5, 6, 5, 6]), sample([8], [9])]


def test_diversity_counts_distinct_tokens_pairs_and_responses_to_a_prompt():
    found = diversity(SAMPLES)
    assert found["response/distinct_1"] == pytest.approx(3 / 13)
    assert found["response/distinct_2"] == pytest.approx(2 / 9)
    assert found["response/unique"] == pytest.approx(3 / 4)


def test_the_metrics_of_a_step_by_hand():
    batch = pack([s.prompt + s.response for s in SAMPLES], prompt_lengths=[1] * 4)
    logprobs = -torch.arange(1.0, 14.0) / 10
    batch = batch.with_fields(logprobs=logprobs, rollout_logprobs=logprobs, ref_logprobs=logprobs - 0.2)
    first, second = Statistics(), Statistics()
    extremes = {"ratio_max": "max", "ratio_min": "min"}
    first.add("ppo/policy/", {"ratio_max": torch.tensor(1.0), "ratio_min": torch.tensor(0.99)}, extremes=extremes)
    second.add("ppo/policy/", {"ratio_max": torch.tensor(3.0), "ratio_min": torch.tensor(0.5)}, extremes=extremes)
    shaped = {name: torch.tensor(0.5) for name in ("rewards", "advantages", "advantages_std")}
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0])
    found = describe(batch, SAMPLES, scores, {"rules": scores / 2, "model": scores / 4}, shaped, [first, second])
    expected = {
        "objective/scores": 1.5,
        "objective/scores/rules": 0.75,
        "objective/scores_std/rules": 1.25**0.5 / 2,
        "objective/scores/model": 0.375,
        "objective/kl": 0.2 * 13 / 4,
        "objective/kl_k3": (2.718281828**-0.2 - 1 + 0.2) * 13 / 4,
        "objective/entropy": 0.7,
        "response/length": 13 / 4,
        "response/length_p50": 4,
        "response/length_max": 4,
        "response/eos_rate": 0.75,
        "ppo/policy/first_ratio_min": 0.99,
        "ppo/policy/ratio_max": 3.0,
    }
    assert {name: float(found[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
    alone = describe(batch, SAMPLES, scores, {"rules": scores}, shaped, [first, second])
    assert not [name for name in alone if name.startswith("objective/scores/")]


def test_the_difference_to_the_sampler_is_of_all_tokens_or_of_the_first_update():
    batch = pack([s.prompt + s.response for s in SAMPLES], prompt_lengths=[1] * 4)
    logprobs, first = torch.zeros(13), Statistics()
    other = batch.with_fields(logprobs=logprobs, rollout_logprobs=logprobs.index_fill(0, torch.tensor([2]), -0.13))
    found = rollout_difference(other, first)
    assert found["rollout/logprob_difference"].item() == pytest.approx(0.01)
    assert found["rollout/logprob_difference_max"].item() == pytest.approx(0.13)
    same = batch.with_fields(logprobs=logprobs, rollout_logprobs=logprobs)
    assert rollout_difference(same, first) == {}  # the value model's warm-up: the trainer has not read the tokens yet
    first.add("ppo/policy/", {"logprob_change": torch.tensor(0.25), "logprob_change_max": torch.tensor(0.5)})
    expected = {"rollout/logprob_difference": 0.25, "rollout/logprob_difference_max": 0.5}
    assert rollout_difference(same, first) == expected


WELL = {
    "objective/kl": 1.0,
    "objective/entropy": 2.0,
    "response/length": 10.0,
    "response/eos_rate": 0.9,
    "ppo/policy/first_ratio_max": 1.0,
    "ppo/policy/first_ratio_min": 1.0,
}


@pytest.mark.parametrize(
    ("ill", "words"),
    [
        ({"objective/kl": -1.0}, r"the KL to the reference is -0\.100 nats a token"),
        ({"ppo/policy/first_ratio_min": 0.8}, r"a ratio is 0\.20 away from 1"),
        ({"objective/entropy": 0.1}, r"the entropy fell from 2\.000 to 0\.100"),
        ({"response/length": 30.0, "response/eos_rate": 0.2}, "responses grew from 10 to 30 tokens"),
    ],
)
def test_a_run_that_looks_ill_says_so_once_even_when_it_is_resumed(ill, words):
    health = HealthChecks()
    assert health.check(WELL) == []
    (warning,) = health.check({**WELL, **ill})
    assert re.search(words, warning)
    resumed = HealthChecks()
    resumed.state = json.loads(json.dumps(health.state))
    assert resumed.check({**WELL, **ill}) == []


def test_ratios_that_should_not_start_at_one_raise_no_warning():
    """truncation=sampler takes them to the log-probabilities after top_k, top_p and min_p."""
    assert HealthChecks(ratios_start_at_one=False).check({**WELL, "ppo/policy/first_ratio_min": 0.5}) == []
    assert len(HealthChecks().check({**WELL, "ppo/policy/first_ratio_min": 0.5})) == 1


def test_samples_are_left_with_score_and_kl_and_cut_back_on_resume(tmp_path):
    batch = pack([s.prompt + s.response for s in SAMPLES], prompt_lengths=[1] * 4)
    logprobs = torch.zeros(13)
    batch = batch.with_fields(logprobs=logprobs, ref_logprobs=logprobs - 0.5)
    rows = sample_rows(SAMPLES, batch, torch.arange(4.0), tiny_tokenizer(), 2)
    assert [(row["score"], row["kl"], row["finished"]) for row in rows] == [(0.0, 2.0, True), (1.0, 2.0, False)]
    log = MetricsLog(tmp_path, num_steps=4)
    log.samples(1, rows)
    log.samples(3, rows)
    MetricsLog(tmp_path, num_steps=4, step=2)
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == [1, 1]
