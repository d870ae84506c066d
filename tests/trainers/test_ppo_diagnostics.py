"""What a PPO run tells of its phases, its rewards, and how far sampler and trainer are apart."""

import pytest
from ppo_runs import config, make_folder

from fastrlhf import PPO
from fastrlhf.rewards.scorer import short_names
from fastrlhf.runtime.jsonl import read_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
PHASES = ("generate", "score", "update")


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def test_terms_with_equal_last_parts_are_named_whole():
    assert short_names(["runs/a/model", "my.rules:brief"]) == ["model", "brief"]
    assert short_names(["runs/a/model/", "runs/b/model"]) == ["runs/a/model/", "runs/b/model"]


def test_every_phase_of_a_step_is_timed_with_its_tokens(folder):
    (metrics,) = list(PPO(config(folder, steps=1)))
    (timing,) = read_jsonl(folder / "out/timing.jsonl")
    tokens = {name: timing[f"{name}_tokens_per_second"] * timing[f"{name}_seconds"] for name in PHASES}
    responses, total = 8 * metrics["response/length"], metrics["num_tokens"]
    assert tokens == pytest.approx({"generate": responses, "score": total, "update": 2 * total})
    assert 0.8 < sum(timing[f"{name}_share"] for name in PHASES) <= 1


def test_the_difference_between_sampler_and_trainer_is_told_at_every_step(folder):
    for metrics in PPO(config(folder, value_warmup_steps=0)):
        assert metrics["rollout/logprob_difference"] <= metrics["rollout/logprob_difference_max"] < 1e-4
        assert metrics["ppo/policy/logprob_change"] > 1e-4
    half = next(PPO(config(folder, dtype="bfloat16", output=str(folder / "half"))))
    assert 1e-4 < half["rollout/logprob_difference"] < 0.1
