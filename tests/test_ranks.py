"""Two processes under torchrun compute what one process computes, and end together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loops import ROOT, demonstrations, model_folder, pairs, write_rows
from rank_worker import run
from tiny import tiny_tokenizer

from fastrlhf.metrics import read_jsonl
from fastrlhf.models import RewardModel

WORKER = str(ROOT / "tests" / "rank_worker.py")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
}


def torchrun(*arguments, num_processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return subprocess.run([*command, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def specs(folder):
    """Each loop, and of PPO estimators with and without a value model."""
    ppo = {
        "model": str(folder / "model"),
        "data": str(folder / "prompts.jsonl"),
        "reward": "rank_worker:share_of_low_tokens",
        "steps": 3,
        "batch_size": 8,
        "minibatches": 2,
        "epochs": 2,
        "max_new_tokens": 12,
        "max_tokens": 64,
        "learning_rate": 1e-3,
        "value_learning_rate": 1e-3,
    }
    ptx = str(folder / "demonstrations.jsonl")
    tuned = {"model": str(folder / "model"), "max_tokens": 64, "learning_rate": 1e-3, "eval_fraction": 0.2}
    return {
        # the first process's responses end long before those of the second
        "gae": {"loop": "ppo", "settings": {**ppo, "value_warmup_steps": 1}, "limits": [1, 2, 1, 1, 12, 11, 12, 12]},
        "groups": {
            "loop": "ppo",
            "settings": {
                **ppo,
                "reward": f"{folder / 'reward'}=1,rank_worker:share_of_low_tokens=2",
                "estimator": "reinforce++_baseline",
                "samples_per_prompt": 2,
                "loss_mean": "prompt",
                "score_norm": "whiten",
                "max_update_kl": 0.05,
                "ptx_data": ptx,
                "ema_decay": 0.9,
            },
        },
        "remax": {"loop": "ppo", "settings": {**ppo, "estimator": "remax", "kl_target": 1.0}},
        # the last batch is one row, so one process has none
        "sft": {"loop": "sft", "settings": {**tuned, "data": ptx, "batch_size": 9, "epochs": 1}},
        "reward": {"loop": "reward", "settings": {**tuned, "data": str(folder / "pairs.jsonl"), "batch_size": 8}},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    model_folder(path / "model")
    RewardModel.from_pretrained(path / "model", new_head=True).save_pretrained(path / "reward")
    tiny_tokenizer(300).save_pretrained(path / "reward")
    write_rows(path / "prompts.jsonl", [{"prompt": f"Say {n * 37}"} for n in range(40)])
    demonstrations(path / "demonstrations.jsonl", num=24)
    pairs(path / "pairs.jsonl")
    return path


@pytest.fixture(scope="module")
def found(folder):
    """Tokens sampled in each run, by one process and by two."""
    both = []
    for name in ("one", "two"):
        runs = [
            {**spec, "settings": {**spec["settings"], "output": str(folder / name / key)}}
            for key, spec in specs(folder).items()
        ]
        if name == "one":
            both.append([run(spec) for spec in runs])
        else:
            file = Path(write_rows(folder / "runs.json", []))
            file.write_text(json.dumps(runs))
            done = torchrun(WORKER, str(file))
            assert done.returncode == 0, done.stderr
            both.append(json.loads(file.with_suffix(".found").read_text()))
    return [dict(zip(specs(folder), found, strict=True)) for found in both]


@pytest.mark.parametrize("name", ["gae", "groups", "remax"])
def test_two_processes_sample_what_one_samples(found, name):
    one, two = (each[name] for each in found)
    assert one == two and len(one) == (6 if name == "remax" else 3)


@pytest.mark.parametrize("name", ["gae", "groups", "remax", "sft", "reward"])
def test_two_processes_have_the_metrics_of_one(found, folder, name):
    one, two = (read_jsonl(folder / number / name / "metrics.jsonl") for number in ("one", "two"))
    assert len(one) == len(two) >= 3
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
