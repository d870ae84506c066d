"""Two processes under torchrun compute what one process computes, and end together."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from loops import ROOT, demonstrations, model_folder, pairs, write_rows
from rank_worker import run
from safetensors.torch import load_file
from tiny import ARCHITECTURES, tiny_tokenizer

from fastrlhf.models.policy import RewardModel
from fastrlhf.runtime import distributed
from fastrlhf.runtime.jsonl import read_jsonl

WORKER = str(ROOT / "tests" / "rank_worker.py")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
}


SHARDED = {"gae": {"gradient_checkpointing": True}}  # further settings of the runs in shards
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
                "reference_every": 2,
                "save_every": 1,
                "eval_data": str(folder / "held_out.jsonl"),
                "eval_every": 2,
                "eval_reward": "rank_worker:share_of_low_tokens",
            },
        },
        "remax": {"loop": "ppo", "settings": {**ppo, "estimator": "remax", "kl_target": 1.0}},
        "lora": {"loop": "ppo", "settings": {**ppo, "lora_rank": 4, "learning_rate": 1e-2}},
        # the last batch is one row, so one process has none
        "sft": {"loop": "sft", "settings": {**tuned, "data": ptx, "batch_size": 9, "epochs": 1}},
        "reward": {"loop": "reward", "settings": {**tuned, "data": str(folder / "pairs.jsonl"), "batch_size": 8}},
        "dpo": {"loop": "dpo", "settings": {**tuned, "data": str(folder / "pairs.jsonl"), "batch_size": 8}},
        "rankings": {"loop": "reward", "settings": {**tuned, "data": str(folder / "rankings.jsonl"), "batch_size": 5}},
        "kto": {
            "loop": "kto",
            "settings": {**tuned, "data": str(folder / "labelled.jsonl"), "batch_size": 5, "loss": "kto"},
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    model_folder(path / "model", tie_word_embeddings=True)
    RewardModel.from_pretrained(path / "model", new_head=True).save_pretrained(path / "reward")
    tiny_tokenizer(300).save_pretrained(path / "reward")
    write_rows(path / "prompts.jsonl", [{"prompt": f"Say {n * 37}"} for n in range(40)])
    write_rows(path / "held_out.jsonl", [{"prompt": f"Ask {n * 37}"} for n in range(3)])  # not as many for each process
    demonstrations(path / "demonstrations.jsonl", num=24)
    pairs(path / "pairs.jsonl")
    rows = [{"prompt": f"Say {n * 37}", "head": "ab"[n % 2]} for n in range(20)]
    texts = [[f"{(n + 1) * k * 7919}" for k in range(1, 3 + n % 4)] for n in range(20)]  # 2 to 5 responses
    ranked = [{**row, "responses": t, "ranks": [*range(len(t))]} for row, t in zip(rows, texts, strict=True)]
    write_rows(path / "rankings.jsonl", ranked)
    labelled = [{"prompt": f"Say {n * 37}", "completion": t[0], "label": n % 3 > 0} for n, t in enumerate(texts)]
    write_rows(path / "labelled.jsonl", labelled)
    return path


@pytest.fixture(scope="module")
def found(folder):
    """What the worker tells of each run: by one process, by two, and by two that hold shards."""
    both = []
    for name in ("one", "two"):
        runs = [changed(spec, output=str(folder / name / key)) for key, spec in specs(folder).items()]
        if name == "one":
            both.append([run(spec) for spec in runs])
        else:
            sharded = [
                changed(spec, output=str(folder / "shards" / key), parallel="fsdp", **SHARDED.get(key, {}))
                for key, spec in specs(folder).items()
                if key != "lora"
            ]
            refused = changed(specs(folder)["groups"], output=str(folder / name / "refused"), batch_size=6)
            done = run_in_two(folder, [*runs, *sharded, {**refused, "refused": True}, "shards"])
            assert done.returncode == 0, done.stderr
            found = json.loads((folder / "runs.found").read_text())
            both.append(found[: len(runs)])
    names = list(specs(folder))
    one, two = (dict(zip(names, each, strict=True)) for each in both)
    names.remove("lora")
    return (
        one,
        {**two, "refused": found[-2]},
        {**dict(zip(names, found[len(runs) :], strict=False)), "errors": found[-1]},
    )


def changed(spec, **settings):
    """A run with other settings."""
    return {**spec, "settings": {**spec["settings"], **settings}}


def test_two_processes_train_an_adapter_as_one_does(found, folder):
    assert found[0]["lora"]["sampled"] == found[1]["lora"]["sampled"]
    one, two = (read_jsonl(folder / number / "lora" / "metrics.jsonl") for number in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["gae", "groups", "remax"])
def test_two_processes_sample_what_one_samples(found, name):
    one, two, shards = (each[name]["sampled"] for each in found)
    assert one == two == shards and len(one) == {"remax": 6, "groups": 6}.get(name, 3)


@pytest.mark.parametrize("name", ["gae", "groups", "remax", "sft", "reward", "dpo", "rankings", "kto"])
@pytest.mark.parametrize("how", ["two", "shards"])
def test_two_processes_have_the_metrics_of_one(found, folder, name, how):
    one, other = (read_jsonl(folder / run / name / "metrics.jsonl") for run in ("one", how))
    assert len(one) == len(other) >= 3
    for ours, theirs in zip(one, other, strict=True):
        assert_close(ours, theirs)


def assert_close(ours, theirs):
    """Metrics that differ by rounding alone; None stands for one that is unknown."""
    known = {name for name, value in theirs.items() if value is not None}
    assert {name for name, value in ours.items() if value is not None} == known and ours.keys() == theirs.keys()
    assert {n: ours[n] for n in known} == pytest.approx({n: theirs[n] for n in known}, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["gae", "groups", "remax", "sft", "reward", "dpo", "rankings", "kto"])
def test_a_process_holds_its_shards_only(found, name):
    _, two, shards = (each[name]["held"] for each in found)
    assert two == 1 and 0.45 < shards < 0.55


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shards_of_every_architecture_have_the_gradients_of_the_whole(found, arch):
    assert found[2]["errors"][arch] < 1e-5


def test_shards_of_a_single_process_are_refused(folder):
    with pytest.raises(ValueError, match="fsdp needs several processes; torchrun starts them"):
        run(changed(specs(folder)["sft"], output=str(folder / "single"), parallel="fsdp"))
    with pytest.raises(ValueError, match=r"adapters \(lora_rank\) take ddp"):
        run(changed(specs(folder)["lora"], output=str(folder / "single"), parallel="fsdp"))


@pytest.mark.parametrize("name", ["gae", "groups", "remax", "sft", "reward", "dpo", "rankings", "kto"])
def test_the_final_model_is_whole_and_that_of_one_process(found, folder, name):
    one, two, shards = (load_file(folder / run / name / "model/model.safetensors") for run in ("one", "two", "shards"))
    assert one.keys() == two.keys() == shards.keys()
    for key, value in one.items():
        assert torch.allclose(value, two[key], rtol=1e-4, atol=1e-5)
        assert torch.allclose(value, shards[key], rtol=1e-4, atol=1e-5)
    configs = [json.loads((folder / run / name / "model/config.json").read_text()) for run in ("one", "two", "shards")]
    biases = [torch.tensor(config.pop("reward_bias", 0.0)) for config in configs]
    assert configs[0] == configs[1] == configs[2]
    for bias in biases[1:]:
        torch.testing.assert_close(bias, biases[0], rtol=1e-4, atol=1e-5)


def back_to_step_2(folder, name, new):
    """Settings that resume a copy of a run after its second step."""
    shutil.copytree(folder / name / "groups", folder / new)
    shutil.rmtree(folder / new / "model")
    shutil.rmtree(folder / new / "checkpoints" / "step-000003")
    return {**specs(folder)["groups"]["settings"], "output": str(folder / new), "resume": True}


def assert_same_run(one, other):
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for file in (one / "model").iterdir():
        assert file.read_bytes() == (other / "model" / file.name).read_bytes(), file.name


def test_a_killed_process_ends_the_run_and_runs_resume_bit_for_bit(found, folder):
    spec = changed(specs(folder)["groups"], output=str(folder / "killed"))
    done = run_in_two(folder, [{**spec, "killed_after": 2}])
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert len(read_jsonl(folder / "killed" / "metrics.jsonl")) == 3 and not (folder / "killed" / "model").exists()
    sharded = {**back_to_step_2(folder, "shards", "again"), "parallel": "fsdp"}
    done = run_in_two(folder, [changed(spec, resume=True), {"loop": "ppo", "settings": sharded}])
    assert done.returncode == 0, done.stderr
    assert_same_run(folder / "two" / "groups", folder / "killed")
    assert_same_run(folder / "shards" / "groups", folder / "again")


@pytest.mark.usefixtures("one_thread")  # as the two had
def test_one_process_resumes_what_two_left_in_shards(found, folder):
    settings = back_to_step_2(folder, "shards", "alone")
    with pytest.warns(UserWarning, match="processes was 2 and is 1"):
        run({"loop": "ppo", "settings": settings})
    one, other = (read_jsonl(folder / run / "metrics.jsonl") for run in ("shards/groups", "alone"))
    assert_close(other[2], one[2])


def test_what_one_process_cannot_do_ends_all_with_its_message(folder):
    settings = {**specs(folder)["gae"]["settings"], "reward": "rank_worker:nan_in_the_second"}
    done = torchrun("-m", "fastrlhf", "ppo", *options({**settings, "output": folder / "nan"}))
    assert done.returncode != 0
    assert "fastrlhf ppo: error: reward: nan_in_the_second gave nan for response 0 to prompt 'Say" in done.stderr


def test_a_batch_that_processes_cannot_share_is_refused(found, folder):
    assert not (folder / "two" / "refused").exists()
    assert found[1]["refused"]["error"] == "batch_size (6) must be a multiple of 2 processes x 2 samples_per_prompt"


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


def test_a_process_without_a_gpu_of_its_own_is_named(monkeypatch):
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "get_node_local_rank", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU: torch sees 2"):
        distributed.start()
