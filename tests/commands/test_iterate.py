"""`fastrlhf iterate`, with a tiny random model: what each round learns from, and a run that is stopped anywhere."""

import json
import os
import signal
import statistics
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from fake_server import serving
from hooks import interrupted_in_step
from judging import top_logprobs
from loops import ROOT, model_folder, write_rows
from transformers import AutoModelForSequenceClassification

from fastrlhf.cli.main import main
from fastrlhf.commands.feedback import label
from fastrlhf.commands.feedback.iterate import Iterate
from fastrlhf.data.template import Renderer, load_tokenizer
from fastrlhf.errors import DataError
from fastrlhf.runtime.jsonl import read_jsonl
from fastrlhf.settings.feedback import IterateConfig

pytestmark = pytest.mark.usefixtures("one_thread")
GOLD = """
asked = []


def early_letters(prompts, responses, *, topic, **columns):
    assert [f"question {n}" for n in topic] == prompts
    asked.append([sum(character < "n" for character in response) / 8 for response in responses])
    return asked[-1]


def by_subject(prompts, responses, *, subject):
    return [0.0 for _ in responses]
"""

KILLED = """
import os, signal
from fastrlhf.commands.feedback.iterate import Iterate, RewardTrainer
from fastrlhf.settings.feedback import IterateConfig
step = RewardTrainer.step


def killed(loop):
    if "round-2" in loop.config.output and loop.num_steps_done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(loop)


RewardTrainer.step = killed
list(Iterate(IterateConfig(**{settings!r})))
"""


def chat(body):
    """A judge with an opinion of its own on each question."""
    odds = zlib.crc32(body["messages"][0]["content"].encode()) % 1000 / 200 - 2.5
    listed = [{"token": token, "logprob": value} for token, value in top_logprobs(odds).items()]
    return {"choices": [{"logprobs": {"content": [{"token": "A", "top_logprobs": listed}]}}]}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    (tmp_path / "tiny_gold_of_rounds.py").write_text(GOLD)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"prompt": f"question {n}", "topic": n} for n in range(20)]
    return {
        "output": str(tmp_path / "run"),
        "model": model_folder(tmp_path / "model", pad_is_eos=True),
        "gold": "tiny_gold_of_rounds:early_letters",
        "data": write_rows(tmp_path / "prompts.jsonl", rows),
        "rounds": 2,
        "num_pairs": 8,
        "num_heldout": 6,
        "max_rejected": 0.5,
        "reward_batch_size": 4,
        "steps": 2,
        "batch_size": 4,
        "minibatches": 2,
        "max_new_tokens": 8,
        "learning_rate": 1e-3,
        "device": "cpu",
    }


@pytest.fixture
def judged(settings):
    """The same with a judge on a server in place of the gold function."""
    with serving({"/v1/chat/completions": chat}) as running:
        judge = {"judge": running.url, "judge_model": "policy"}
        yield {**settings, "gold": None, **judge, "judge_batch": 3, "rounds": 1}


def run(settings, **changes):
    return dict(Iterate(IterateConfig(**{**settings, **changes})))


def files_of(output):
    """The content of every file of a run that does not depend on the clock or on where it lies."""
    names = [path.relative_to(output) for path in Path(output).rglob("*") if path.is_file()]
    changing = ("timing.jsonl", "config.yaml", "inputs.json")
    return {str(n): (Path(output) / n).read_bytes() for n in names if not str(n).endswith(changing)}


def test_each_round_labels_learns_from_all_pairs_and_goes_on_from_the_last_policy(settings):
    results = run(settings)
    output = Path(settings["output"])
    asked = sys.modules["tiny_gold_of_rounds"].asked
    stages = [f"round-{n}/{stage}" for n in (1, 2) for stage in ("pairs", "reward", "ppo")]
    assert list(results) == ["data", *stages, "summary"]
    tables = {name: read_jsonl(output / f"data/{name}.jsonl") for name in ("prompts", "heldout")}
    assert sorted(row["topic"] for rows in tables.values() for row in rows) == list(range(20))
    pairs = [read_jsonl(output / f"round-{n}/pairs/train.jsonl") for n in (1, 2)]
    assert read_jsonl(output / "round-1/comparisons.jsonl") == pairs[0]
    assert read_jsonl(output / "round-2/comparisons.jsonl") == pairs[0] + pairs[1]
    assert {row["prompt"] for row in pairs[0]} & {row["prompt"] for row in tables["heldout"]} == set()
    assert all(row["gold_chosen"] > row["gold_rejected"] and row["rater"] == "gold" for row in pairs[0] + pairs[1])
    ppo = [yaml.safe_load((output / f"round-{n}/ppo/config.yaml").read_text()) for n in (1, 2)]
    assert [config["model"] for config in ppo] == [settings["model"], str(output / "round-1/ppo/model")]
    assert [config["reference"] for config in ppo] == [settings["model"]] * 2
    reward = yaml.safe_load((output / "round-2/reward/config.yaml").read_text())
    assert reward["model"] == settings["model"]
    first, second = json.loads((output / "summary.json").read_text())["rounds"]
    assert first["accuracy_before"] is None and second["comparisons"] == len(pairs[0] + pairs[1])
    last = read_jsonl(output / "round-2/ppo/metrics.jsonl")[-1]
    assert (second["kl"], second["heldout_gold"]) == (last["objective/kl"], last["eval/score"])
    # of both rounds: pairs of 8 prompts, pairs of the 6 that are held out, answers to these
    assert [len(values) for values in asked] == [16, 12, 6] * 2
    for row, pairs_of, answers in ((first, asked[1], asked[2]), (second, asked[4], asked[5])):
        means = [sum(pairs_of[n : n + 2]) / 2 for n in range(0, 12, 2)]
        for name, values in (("gold_before", means), ("heldout_gold", answers)):
            assert row[name] == pytest.approx(statistics.mean(values), abs=1e-6)
            assert row[f"{name}_error"] == pytest.approx(statistics.stdev(values) / 6**0.5, abs=1e-6)
    assert second["accuracy_before"] == pytest.approx(accuracy(output / "round-1/reward/model", pairs[1]))
    assert f"right on {second['accuracy_before']:.1%} of {len(pairs[1])} fresh pairs" in results["round-2/ppo"]
    assert not list(output.rglob("checkpoints"))
    learned = output / "round-2/comparisons.jsonl"
    before = learned.read_bytes()
    learned.unlink()
    assert dict(Iterate(IterateConfig(**settings, resume=True))) == results
    assert learned.read_bytes() == before


def accuracy(folder, pairs):
    """Of a reward model as transformers loads it, a response at a time."""
    model, renderer = AutoModelForSequenceClassification.from_pretrained(folder), Renderer(load_tokenizer(folder))
    right = []
    for row in pairs:
        scores = []
        for side in ("chosen", "rejected"):
            tokens = renderer.prompt(row["prompt"]) + renderer.response(row[side])
            tokens = tokens if row[f"{side}_finished"] else tokens[:-1]
            with torch.no_grad():
                scores.append(model(torch.tensor([tokens])).logits.item())
        right.append(1 if scores[0] > scores[1] else 0.5 if scores[0] == scores[1] else 0)
    return sum(right) / len(right)


def test_what_is_held_out_is_learned_from_nowhere(settings, tmp_path, capsys):
    rows = [{"prompt": f"question {n % 7}", "topic": n % 7} for n in range(20)]
    begin = [
        {"prompt": [{"role": "user", "content": f"question {n}"}], "chosen": "a", "rejected": "b"} for n in range(9)
    ]
    files = {
        "data": write_rows(tmp_path / "twice.jsonl", rows),
        "comparisons": write_rows(tmp_path / "own.jsonl", begin),
    }
    tables = Iterate(IterateConfig(**{**settings, **files, "num_heldout": 2})).tables
    held_out = {row["prompt"] for row in tables["heldout.jsonl"]}
    assert {row["prompt"] for row in tables["prompts.jsonl"]} == {row["prompt"] for row in rows} - held_out
    assert len(tables["comparisons.jsonl"]) == 9 - len(held_out)
    assert f"comparisons.jsonl: {len(held_out)} rows have a held-out prompt" in capsys.readouterr().out


def test_a_run_killed_in_a_reward_model_and_stopped_in_ppo_continues_to_the_same_files(settings, tmp_path, monkeypatch):
    run(settings, output=str(tmp_path / "whole"))
    killed = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED.format(settings=settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(read_jsonl(Path(settings["output"]) / "round-2/reward/metrics.jsonl")) == 2
    first, second = (Path(settings["output"]) / f"round-{n}/ppo/metrics.jsonl" for n in (1, 2))
    written = first.stat().st_mtime_ns
    with interrupted_in_step(2, second), pytest.raises(KeyboardInterrupt):
        run(settings, resume=True)
    assert len(read_jsonl(second)) == 1 and first.stat().st_mtime_ns == written, "the first round was over"
    left = Path(settings["output"]) / "round-1/ppo/best"  # by a kill just before it is removed
    left.mkdir()
    (left / "model.safetensors").touch()
    run(settings, resume=True)
    assert files_of(settings["output"]) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("loop", ["ppo", "reward"])
def test_settings_of_a_finished_round_may_not_change_before_the_next(settings, tmp_path, monkeypatch, loop):
    file = tmp_path / "further.yaml"
    file.write_text("weight_decay: 0.1\n")
    settings |= {loop: str(file)}
    rounds = Iterate(IterateConfig(**settings))
    while next(rounds)[0] != "round-1/ppo":
        pass
    file.write_text("weight_decay: 0.2\n")
    with pytest.raises(ValueError, match=r"resume: weight_decay was 0.1 and is 0.2"):
        Iterate(IterateConfig(**settings, resume=True))


def test_no_two_rounds_draw_alike_in_jobs_of_neighbouring_seeds(settings):
    seeds = []
    for seed in range(4):
        job = Iterate(IterateConfig(**{**settings, "seed": seed, "output": f"{settings['output']}-{seed}"}))
        seeds += [job.seed(number, what) for number in range(1, 65) for what in range(3)]
    assert len(set(seeds)) == len(seeds) == 4 * 64 * 3


def test_a_run_stopped_while_the_judge_labels_asks_about_the_rest_alone(judged, tmp_path, monkeypatch):
    run(judged, output=str(tmp_path / "whole"))
    judge, calls = label.judge_pairs, []

    def stop_in_the_third(*arguments, **options):
        calls.append(len(arguments[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return judge(*arguments, **options)

    monkeypatch.setattr(label, "judge_pairs", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(judged)
    run(judged, resume=True)
    assert calls == [3, 3, 2, 2, 3, 3], "eight pairs in batches of three, the third batch twice; six held-out ones"
    assert files_of(judged["output"]) == files_of(tmp_path / "whole")
    rows = read_jsonl(Path(judged["output"]) / "round-1/pairs/train.jsonl")
    assert rows == read_jsonl(Path(judged["output"]) / "round-1/labels/train/pairs.jsonl")
    assert {row["rater"] for row in rows} == {"policy"} and all(0.5 < row["preference"] <= 1 for row in rows)


def test_pairs_to_begin_with_are_learned_too_and_the_last_round_alone_on_demand(settings, tmp_path):
    begin = [
        {"chosen": f"\n\nHuman: {n}\n\nAssistant: a", "rejected": f"\n\nHuman: {n}\n\nAssistant: b"} for n in "xyz"
    ]
    said = {"preference": 0.75, "margin": 2, "weight": 0.5, "rater": "ann", "chosen_finished": False}
    path = write_rows(tmp_path / "people.jsonl", [{**begin[0], **said}, *begin[1:]])
    (tmp_path / "reward.yaml").write_text("label_smoothing: 0.1\n")
    run(settings, comparisons=path, rounds=1, reward=str(tmp_path / "reward.yaml"))
    rows = read_jsonl(Path(settings["output"]) / "round-1/comparisons.jsonl")
    assert rows[0]["chosen"] == " a" and rows[0]["prompt"] == [{"role": "user", "content": "x"}]
    assert said.items() <= rows[0].items() and "preference" not in rows[1]
    assert len(rows) == 3 + len(read_jsonl(Path(settings["output"]) / "round-1/pairs/train.jsonl"))
    config = yaml.safe_load((Path(settings["output"]) / "round-1/reward/config.yaml").read_text())
    assert config["label_smoothing"] == 0.1
    run(settings, output=str(tmp_path / "last"), mix="last")
    second = tmp_path / "last/round-2"
    assert (second / "comparisons.jsonl").read_bytes() == (second / "pairs/train.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"gold": None}, "give judge or gold"),
        ({"judge": "folder"}, "give judge or gold"),
        ({"mix": "some"}, "mix must be one of all, last"),
        ({"mix": "last", "comparisons": "x.jsonl"}, "with mix=last they are learned in no round"),
        ({"comparisons": "{folder}/responses.jsonl"}, "responses.jsonl, row 1: no chosen and rejected"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"num_heldout": 20}, "has 20 prompts, of which 20 are held out"),
        ({"gold": "nowhere:f"}, "no module named 'nowhere'"),
        ({"minibatches": 5}, r"minibatches \(5\) must not exceed batch_size \(4\)"),
        ({"ppo": "{folder}/ppo.yaml"}, "ppo.yaml: model follows from the command that reads it"),
        ({"ppo": "{folder}/paid.yaml"}, "paid.yaml: reward follows from the command that reads it"),
        ({"gold": "tiny_gold_of_rounds:by_subject"}, "argument: 'subject'"),
    ],
)
def test_what_cannot_be_done_is_named_before_anything_is_written(settings, tmp_path, changes, text):
    (tmp_path / "ppo.yaml").write_text("model: other\n")
    (tmp_path / "paid.yaml").write_text("reward: other\n")
    write_rows(tmp_path / "responses.jsonl", [{"prompt": "p", "responses": ["a", "b"]}])
    changes = {k: v.format(folder=tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises((ValueError, TypeError, DataError), match=text):
        run(settings, **changes)
    assert not Path(settings["output"]).exists()


def test_the_command_prints_a_line_a_round(settings, capsys):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    assert main(["iterate", *options, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "round-2/ppo: the last reward model is right on" in out
    assert f"summary: {Path(settings['output']) / 'summary.json'}" in out
