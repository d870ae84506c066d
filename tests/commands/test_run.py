"""The main job, with a tiny random model: every stage, a run that is stopped, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hooks import interrupted_in_step
from loops import model_folder, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastrlhf.cli.main import main
from fastrlhf.commands.run import PRODUCTS, Run
from fastrlhf.errors import DataError
from fastrlhf.runtime.jsonl import read_jsonl
from fastrlhf.settings.run import RunConfig
from fastrlhf.trainers.sft import SFT

pytestmark = pytest.mark.usefixtures("one_thread")
GOLD = """
def early_letters(prompts, responses, *, response_ids, finished, question, **columns):
    assert all(text.endswith(q) for text, q in zip(prompts, question))
    return [sum(character < "n" for character in response) / 8 for response in responses]
"""


def prompt_rows(num_reward=12, num_ppo=6, num_heldout=8):
    splits = ["reward"] * num_reward + ["ppo"] * num_ppo + ["heldout"] * num_heldout
    return [{"prompt": f"question {n}", "split": split} for n, split in enumerate(splits)]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    (tmp_path / "tiny_gold.py").write_text(GOLD)
    monkeypatch.syspath_prepend(tmp_path)
    demonstrations = [{"prompt": f"say {n}", "completion": "abc"} for n in range(10)]
    return {
        "output": str(tmp_path / "run"),
        "model": model_folder(tmp_path / "model", pad_is_eos=True),
        "gold": "tiny_gold:early_letters",
        "prompts": write_rows(tmp_path / "prompts.jsonl", prompt_rows()),
        "demonstrations": write_rows(tmp_path / "demonstrations.jsonl", demonstrations),
        "sft_epochs": 1,
        "num_pairs": 16,
        "num_heldout_pairs": 8,
        "pairs_per_prompt": 2,
        "steps": 2,
        "batch_size": 4,
        "minibatches": 2,
        "max_new_tokens": 8,
        "num_heldout_prompts": 8,
        "num_best_of_prompts": 4,
        "best_of": 3,
        "learning_rate": 1e-3,
        "device": "cpu",
    }


def run(settings, **changes):
    return dict(Run(RunConfig(**{**settings, **changes})))


def files_of(output):
    """The content of every deterministic file of a run."""
    names = [f"{loop}/metrics.jsonl" for loop in ("sft", "reward", "ppo")]
    names += ["pairs/train.jsonl", "evaluation/answers.jsonl", "evaluation/summary.json"]
    return {name: (Path(output) / name).read_bytes() for name in names}


def test_every_stage_leaves_its_product(settings):
    results = run(settings)
    output = Path(settings["output"])
    assert list(results) == list(PRODUCTS)
    assert results["data"] == "10 demonstrations, 8 heldout, 6 ppo, 12 reward"
    counts = json.loads((output / "pairs/counts.json").read_text())
    assert counts["pairs"] == 24 and counts["kept"] == counts["pairs"] - counts["ties"] - counts["empty"]
    kept = [len(read_jsonl(output / f"pairs/{part}.jsonl")) for part in ("train", "heldout")]
    assert sum(kept) == counts["kept"] and 0 < kept[0] <= 16 and 0 < kept[1] <= 8
    assert all(row["gold_chosen"] > row["gold_rejected"] for row in read_jsonl(output / "pairs/train.jsonl"))
    summary = json.loads((output / "evaluation/summary.json").read_text())
    answers = read_jsonl(output / "evaluation/answers.jsonl")
    assert [row["question"] for row in answers] == [f"question {n}" for n in range(18, 26)] * 2
    gains = torch.tensor([row["gold_after"] - row["gold_before"] for row in answers], dtype=torch.float64)
    differences = gains.view(2, 8).mean(0)  # of a prompt's two answers
    assert summary["gold"]["difference"]["mean"] == pytest.approx(differences.mean().item(), abs=1e-6)
    assert summary["gold"]["difference"]["error"] == pytest.approx(differences.std().item() / 8**0.5, abs=1e-6)
    assert (summary["best_of_n"]["n"], summary["best_of_n"]["gold"]["num"]) == (3, 4)
    assert "question 18" in (output / "report.html").read_text()
    assert not list(output.rglob("checkpoints"))
    AutoModelForCausalLM.from_pretrained(output / "ppo/model")
    AutoModelForSequenceClassification.from_pretrained(output / "reward/model")
    AutoTokenizer.from_pretrained(output / "ppo/model")


def test_a_complete_run_is_not_done_again_and_a_missing_stage_gives_the_same(settings):
    run(settings)
    output = Path(settings["output"])
    first, seconds = files_of(output), (output / "timing.jsonl").read_text()
    assert list(run(settings, resume=True)) == list(PRODUCTS)
    added = (output / "timing.jsonl").read_text().removeprefix(seconds).splitlines()
    assert [json.loads(line)["stage"] for line in added] == ["report"]
    for name in ("ppo", "evaluation"):
        for path in sorted((output / name).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (output / name).rmdir()
    (output / "timing.jsonl").write_text(seconds + "[1, 2]\n")  # damage to what is told alone
    with pytest.warns(UserWarning, match=r"timing.jsonl, line \d+: damaged, so it and the lines after it are left out"):
        run(settings, resume=True)
    assert files_of(output) == first


def test_a_run_stopped_within_a_loop_continues_to_the_same_result(settings, tmp_path):
    run(settings, output=str(tmp_path / "whole"))
    metrics = Path(settings["output"]) / "ppo/metrics.jsonl"
    with interrupted_in_step(2, metrics), pytest.raises(KeyboardInterrupt):
        run(settings)
    assert len(metrics.read_text().splitlines()) == 1
    run(settings, resume=True)
    assert files_of(settings["output"]) == files_of(tmp_path / "whole")


def test_the_command_says_where_everything_lies(settings, capsys):
    options = [f"--{name}={value}" for name, value in settings.items()]
    assert main(["run", *options, "--system", "none"]) == 0
    lines = capsys.readouterr().out.splitlines()
    output = Path(settings["output"])
    assert lines[-5:] == [
        f"checkpoint: {output / 'ppo/model'}",
        f"reward model: {output / 'reward/model'}",
        f"metrics: {output / 'ppo/metrics.jsonl'}",
        f"evaluation: {output / 'evaluation/summary.json'}",
        f"report: {output / 'report.html'}",
    ]
    assert read_jsonl(output / "data/ppo.jsonl")[0]["prompt"] == "question 12"
    assert main(["run", *options]) == 1
    told = "is not empty: it holds a run of fastrlhf run, finished; --resume (resume=True)"
    assert told in capsys.readouterr().err


def test_a_run_is_resumed_with_its_own_settings_only(settings):
    stages = Run(RunConfig(**settings))
    next(stages)
    Run(RunConfig(**{**settings, "steps": 3}))  # the prompts alone are no work: the folder is free
    next(stages := Run(RunConfig(**settings)))
    next(stages)
    with pytest.raises(ValueError, match="steps was 2 and is 3"):
        Run(RunConfig(**{**settings, "steps": 3, "resume": True}))


def test_overwrite_removes_the_stages_and_nothing_else(settings):
    output, stages = Path(settings["output"]), Run(RunConfig(**settings))
    next(stages)
    next(stages)
    stages.folder.close()
    (output / "notes.txt").write_text("mine")
    again = Run(RunConfig(**{**settings, "overwrite": True}))
    assert (output / "sft/model").is_dir()  # until the first stage
    again.folder.open()
    again.folder.close()
    assert sorted(path.name for path in output.iterdir()) == ["config.yaml", "inputs.json", "notes.txt"]


def test_nothing_is_taken_of_another_run_in_the_folder_of_a_stage(settings):
    stages = Run(RunConfig(**settings))
    next(stages)
    next(stages)
    stages.folder.close()
    SFT(replace(stages.sft_config(), epochs=7, overwrite=True, resume=False)).run()
    with pytest.raises(ValueError, match=r"resume: epochs was 7 and is \d"):
        Run(RunConfig(**settings, resume=True))


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([*prompt_rows(), {"prompt": "question 0", "split": "heldout"}], "held-out prompt 'question 0' is in another"),
        (prompt_rows(num_heldout=7), "has 7 prompts of split heldout, but 8 are needed"),
        (prompt_rows(num_reward=11), "has 11 prompts of split reward, but 12 are needed"),
        ([*prompt_rows(), {"prompt": "q", "split": "test"}], "row 27: split must be reward, ppo, heldout, got 'test'"),
        ([{"prompt": "q"}], "row 1: expected text in column split, got None"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(settings, tmp_path, rows, text):
    with pytest.raises(DataError, match=text):
        run(settings, prompts=write_rows(tmp_path / "other.jsonl", rows))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"preset": "gppu"}, "preset must be auto, cpu or gpu, got 'gppu'; did you mean gpu"),
        ({"num_best_of_prompts": 9}, r"num_best_of_prompts \(9\), num_heldout_prompts \(8\)"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"best_of": 1}, "best_of must be at least 2, got 1"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, changes, text):
    with pytest.raises(ValueError, match=text):
        RunConfig(**{**settings, **changes})


def test_the_preset_follows_the_device_and_what_is_given_wins():
    assert RunConfig(device="cpu").preset == "cpu" and RunConfig(device="cuda").preset == "gpu"
    assert RunConfig(device="cuda").steps > RunConfig(device="cpu").steps
    assert RunConfig(device="cuda", steps=3).steps == 3
