"""Two processes under torchrun compute what one process computes, and end together."""

import json
import os
import socket
import subprocess
import sys

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


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(*arguments):
    """Two processes of a command, to their end, which must come by itself."""
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def options(settings):
    """Settings as the command line has them."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def run_in_two(folder, specs):
    """The worker on these runs in two processes."""
    (folder / "runs.json").write_text(json.dumps(specs))
    return torchrun(WORKER, str(folder / "runs.json"))


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
            done = run_in_two(folder, runs)
            assert done.returncode == 0, done.stderr
            both.append(json.loads((folder / "runs.found").read_text()))
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


def test_a_killed_process_ends_the_run_and_the_run_resumes_bit_for_bit(found, folder):
    spec = specs(folder)["groups"]
    settings = {**spec["settings"], "output": str(folder / "killed"), "save_every": 1}
    done = run_in_two(folder, [{**spec, "settings": settings, "killed_after": 2}])
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    metrics = folder / "killed" / "metrics.jsonl"
    assert len(read_jsonl(metrics)) == 2 and not (folder / "killed" / "model").exists()
    done = run_in_two(folder, [{**spec, "settings": {**settings, "resume": True}}])
    assert done.returncode == 0, done.stderr
    assert metrics.read_bytes() == (folder / "two" / "groups" / "metrics.jsonl").read_bytes()
    for file in (folder / "killed" / "model").iterdir():
        assert file.read_bytes() == (folder / "two" / "groups" / "model" / file.name).read_bytes(), file.name


def test_what_one_process_cannot_do_ends_all_with_its_message(folder):
    settings = {**specs(folder)["gae"]["settings"], "reward": "rank_worker:nan_in_the_second"}
    done = torchrun("-m", "fastrlhf", "ppo", *options({**settings, "output": folder / "nan"}))
    assert done.returncode != 0
    assert "fastrlhf ppo: error: reward: nan_in_the_second gave nan for response 0 to prompt 'Say" in done.stderr


def test_a_batch_that_processes_cannot_share_is_refused(folder):
    settings = {**specs(folder)["groups"]["settings"], "batch_size": 6, "output": folder / "refused"}
    done = torchrun("-m", "fastrlhf", "ppo", *options(settings))
    assert done.returncode != 0 and not (folder / "refused").exists()
    assert "batch_size (6) must be a multiple of 2 processes x 2 samples_per_prompt" in done.stderr


def test_nodes_that_meet_at_an_address_train_together(found, folder):
    """Two nodes of one process each; what they meet at is on the first one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = {**specs(folder)["sft"]["settings"], "output": folder / "nodes"}
    nodes = [
        subprocess.Popen(
            [
                *TORCHRUN,
                *("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=nodes"),
                *(f"--rdzv-endpoint={meeting}", f"--local-addr={address}", "-m", "fastrlhf", "sft"),
                *options(settings),
            ],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for address in ("127.0.0.1", "127.0.0.2")
    ]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum(f"model: {folder / 'nodes' / 'model'}" in text for text in said) == 1
    assert (folder / "nodes" / "metrics.jsonl").read_bytes() == (folder / "two" / "sft" / "metrics.jsonl").read_bytes()
