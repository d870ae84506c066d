"""A PPO step of ours against that of TRL 1.12's PPOTrainer, the last that TRL had, on the same models and responses.

Opt-in: TRL_PPO_PYTHON names a Python that has TRL 1.12 (and torch and transformers); our side stays in this one.
Responses have one length and no end, and a minibatch is one micro-batch, so that what TRL counts differently (pads in
the value loss and in statistics, scores a token late, means of micro-batches' means) is not in play. One difference
remains and is accounted for: TRL whitens with the unbiased variance of n tokens, we with the biased one, so that its
whitened advantages, and with them the policy's loss and gradients, are ours times sqrt((n - 1) / n).
"""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from ppo_by_hand import assert_same_gradients, make_models, our_step, responses_of

PYTHON = os.environ.get("TRL_PPO_PYTHON")
if not PYTHON:
    pytest.skip("TRL_PPO_PYTHON names no Python with TRL 1.12", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("one_thread")
NUM, LENGTH = 6, 7
SHARED = {"kl_coef": 0.3, "gamma": 0.97, "lam": 0.9, "temperature": 0.7}


@pytest.fixture(scope="module", params=["k1", "k3"])
def steps(request, tmp_path_factory):
    folder = make_models(tmp_path_factory.mktemp("models"))
    rows, shared = responses_of([LENGTH] * NUM, eos=()), {**SHARED, "kl_estimator": request.param}
    theirs = {"vf_coef": 0.4, "num_ppo_epochs": 2, "missing_eos_penalty": 0.5, **shared}
    (folder / "task.json").write_text(json.dumps({"rows": rows, "settings": theirs}))
    ours = our_step(folder, rows, max_tokens=10_000, value_coef=0.4, missing_eos="subtract:0.5", **shared)
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    script = Path(__file__).with_name("trl_ppo.py")
    done = subprocess.run([PYTHON, script, folder], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return ours, torch.load(folder / "theirs.pt")


def test_scores_kl_values_and_returns_are_trls_on_average(steps):
    """Of each token they are TRL's because the gradients are."""
    metrics, theirs = steps[0]["metrics"], steps[1]
    kl = (theirs["logprobs"] - theirs["ref_logprobs"]).sum(1).mean()
    expected = {
        "objective/kl": kl,
        "objective/rlhf_reward": theirs["rewards"].sum(1).mean(),
        "ppo/value/mean": theirs["values"].mean(),
        "ppo/returns/mean": theirs["returns"].mean(),
        "objective/advantages_std": (theirs["returns"] - theirs["values"]).std(correction=0),
    }
    found = {name: metrics[name] for name in expected}
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5, abs=1e-5)


def bessel():
    return math.sqrt(NUM * LENGTH / (NUM * LENGTH - 1))


def test_losses_are_trls(steps):
    ours, theirs = steps
    policy, value = (sum(theirs[f"{name}_loss"]) / 2 for name in ("policy", "value"))
    assert ours["metrics"]["ppo/policy/loss"] == pytest.approx(bessel() * policy, rel=1e-5, abs=1e-6)
    assert ours["metrics"]["ppo/value/loss"] == pytest.approx(value, rel=1e-5)
    assert ours["metrics"]["ppo/policy/clip_fraction"] > 0 < ours["metrics"]["ppo/value/clip_fraction"]


@pytest.mark.parametrize("update", [0, 1])
def test_gradients_are_trls(steps, update):
    ours, theirs = steps
    expected = {name: bessel() * gradient for name, gradient in theirs["policy"][update].items()}
    assert_same_gradients(ours["model"][update], expected)
    assert_same_gradients(ours["reward"][update], theirs["value"][update])
