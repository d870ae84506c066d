"""The command, from files to page: what it scores, what it writes."""

import gzip
import json
import math
import random
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hooks import after_forward
from html_page import Page
from loops import model_folder, write_rows
from tiny import tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trust_files import make_files, report, settings

from fastrlhf.cli.main import main
from fastrlhf.commands.reward_report.command import EvaluateReward, names_of
from fastrlhf.models.policy import RewardModel
from fastrlhf.packing import pack
from fastrlhf.runtime.metrics import MetricsLog
from fastrlhf.settings.training import RewardConfig
from fastrlhf.settings.trust import EvaluateRewardConfig
from fastrlhf.trainers.packed_rows import full_sequences
from fastrlhf.trainers.reward import RewardTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
HH = Path(__file__).parents[2] / ".." / "shared" / "data" / "hh_harmless.jsonl.gz"
PROBES = Path(__file__).parents[1] / "fixtures" / "sycophancy.jsonl"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def test_scores_are_those_of_transformers_and_the_accuracy_is_theirs(files, tmp_path):
    summary, rows, _, said = report(settings(files, tmp_path / "out", plots=False))
    model, tokenizer = (
        auto.from_pretrained(files["a"]) for auto in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    data = [json.loads(line) for line in Path(files["data"]).read_text().splitlines()]
    right = []
    for row, own in zip(data, rows, strict=True):
        scores = {}
        for side in ("chosen", "rejected"):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
            scores[side] = model(input_ids=ids).logits.item() + 0.25
        assert own["scores"]["reward"] == pytest.approx(scores, abs=1e-5)
        assert own["columns"]["rater"] == row["rater"]
        right.append(scores["chosen"] > scores["rejected"])
    assert summary["overall"]["accuracy"] == pytest.approx(sum(right) / 50)
    assert summary["overall"]["num_clusters"] == len({row["prompt"] for row in data})
    by_rater = summary["groups"]["rater"]["cy"]
    assert (by_rater["num"], by_rater["accuracy"]) == (10, pytest.approx(sum(right[40:]) / 10))
    assert {own["num"] for own in summary["groups"]["split"].values()} == {25}
    assert said[-1].startswith("accuracy ")


def test_one_page_with_every_section_that_needs_nothing_else(files, tmp_path):
    config = settings(
        files,
        tmp_path / "out",
        model=f"{files['a']},{files['b']}",
        benchmark=files["benchmark"],
        sycophancy=str(PROBES),
        reference_data=files["reference"],
    )
    summary, rows, text, _ = report(config)
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe"})
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) >= 8 and all(source.startswith("data:image/svg+xml;base64,") for source in images)
    words = " ".join(page.text)
    for title in (
        "Accuracy",
        "Calibration",
        "Length",
        "Labels",
        "Ensemble",
        "Benchmark",
        "Sycophancy",
        "surest errors",
    ):
        assert title in words
    assert set(rows[0]["scores"]) == set(summary["models"]) and len(summary["models"]) == 2
    margins = [sum(own["chosen"] - own["rejected"] for own in row["scores"].values()) / 2 for row in rows]
    assert [row["margin"] for row in rows] == pytest.approx(margins)
    assert summary["ensemble"]["mean"] == summary["overall"]
    assert summary["benchmark"]["sections"].keys() == {"a", "b"}
    assert summary["sycophancy"]["num"] == 6
    assert summary["drift"]["divergence_p"] < 0.01 and summary["drift"]["shared"] == 0
    assert summary["labels"]["agreement"]["num_items"] == summary["labels"]["repeats"]["num_rows"] - 40
    assert summary["labels"]["agreement"]["agreement"] == 1


def test_a_function_scores_texts_and_sees_the_columns(files, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def count(prompts, responses, *, finished, id=None):\n"
        "    assert all(finished) and len(prompts) == len(responses) == len(id)\n"
        "    return [response.count('x') for response in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    config = settings(files, "out", model="mine:count", tokenizer=files["a"], plots=False)
    summary, rows, _, _ = report(config)
    data = [json.loads(line) for line in Path(files["data"]).read_text().splitlines()]
    counts = [row["chosen"].count("x") - row["rejected"].count("x") for row in data]
    assert [row["margin"] for row in rows] == counts
    assert summary["overall"]["ties"] == counts.count(0)
    with pytest.raises(ValueError, match="tokenizer: functions have none"):
        EvaluateReward(settings(files, "other", model="mine:count", plots=False))


def test_rankings_labels_and_ratings_are_taken_as_pairs(files, tmp_path):
    rows = {
        "rankings": [{"prompt": "p", "responses": ["a", "b", "c", "d"], "ranks": [1, 0, 1, 2], "rater": "ann"}] * 2,
        "labels": [{"prompt": "p", "completion": c, "label": c in "ab"} for c in "abcde"],
        "ratings": [
            {"prompt": "p", "completion": c, "ratings": {"short": n, "kind": n // 2}} for n, c in enumerate("abc")
        ],
    }
    found = {}
    for name, own in rows.items():
        file = write_rows(tmp_path / f"{name}.jsonl", own)
        found[name] = report(settings(files, tmp_path / name, data=file, plots=False))[0]
    # of six pairs of four responses one ties; two right ones beside three wrong ones; three and two pairs
    assert [found[name]["overall"]["num"] for name in rows] == [10, 6, 5]
    assert found["rankings"]["labels"]["repeats"]["duplicates"] == 5
    heads = found["ratings"]["groups"]["head"]
    assert {name: own["num"] for name, own in heads.items()} == {"short": 3, "kind": 2}
    alone = write_rows(tmp_path / "alone.jsonl", rows["labels"][:2])
    with pytest.raises(ValueError, match="no two responses to one prompt were judged differently"):
        EvaluateReward(settings(files, tmp_path / "alone", data=alone, plots=False))


def test_each_different_response_is_scored_once(files, tmp_path, monkeypatch):
    answers = [chr(97 + n) * (n + 1) for n in range(10)]
    row = {"prompt": "p", "responses": answers, "ranks": list(range(10))}
    config = settings(files, tmp_path / "out", data=write_rows(tmp_path / "r.jsonl", [row, row]), plots=False)
    loop, model, scored = EvaluateReward(config), RewardModel.from_pretrained(files["a"]), []
    assert len(loop.pairs) == 90
    expected = [[model(pack([side])).item() for side in full_sequences(pair)] for pair in loop.pairs[:45]]
    monkeypatch.setattr("fastrlhf.commands.reward_report.command.can_share_prompts", lambda *_: True)
    with after_forward(RewardModel, lambda model, inputs, output: scored.append(inputs[0])):
        scores = loop.score("a", loop.scorers[0], loop.pairs)
    torch.testing.assert_close(scores, torch.tensor(expected * 2).double(), rtol=1e-4, atol=1e-5)
    assert sum(part.num_sequences for part in scored) == 10
    prompt, response = len(loop.pairs[0].prompt), sum(len(answer) + 1 for answer in answers)
    assert sum(part.num_tokens for part in scored) == prompt + response


def test_the_bar_counts_every_token_that_is_scored(files, tmp_path, monkeypatch):
    told = {}

    @contextmanager
    def bar(what, total):
        told[what] = [total]
        yield told[what].append

    monkeypatch.setattr(MetricsLog, "progress", bar)
    loop = EvaluateReward(settings(files, tmp_path / "out", plots=False, max_tokens=64))
    list(loop)
    ((what, (total, *parts)),) = told.items()
    assert what == "score by reward" and len(parts) > 10 and sum(parts) == total
    assert total == sum(map(len, {tuple(side) for pair in loop.pairs for side in full_sequences(pair)}))


def test_one_head_of_several_is_evaluated(files, tmp_path):
    model = RewardModel.from_pretrained(str(Path(files["a"]).parent / "body"), new_head=True, heads=["kind", "short"])
    model.save_pretrained(tmp_path / "heads")
    tiny_tokenizer().save_pretrained(tmp_path / "heads")
    source = f"{tmp_path / 'heads'}#short"
    summary, rows, _, _ = report(settings(files, tmp_path / "out", model=source, plots=False))
    one = RewardModel.from_pretrained(str(tmp_path / "heads"), head="short")
    loop = EvaluateReward(settings(files, tmp_path / "other", model=source, plots=False))
    chosen, rejected = (one(pack([side])).item() for side in full_sequences(loop.pairs[0]))
    assert rows[0]["margin"] == pytest.approx(chosen - rejected, abs=1e-5)
    assert summary["models"] == ["heads#short"]
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    other = {**row, "chosen": "b", "rejected": "a", "head": "kind"}
    data = write_rows(tmp_path / "data.jsonl", [{**row, "head": "short"}, other, other])
    summary, rows, _, _ = report(settings(files, tmp_path / "short", model=source, data=data, plots=False))
    assert summary["overall"]["num"] == len(rows) == 1 and summary["labels"]["repeats"]["contradicted"] == 0
    assert summary["files"][-1] == "1 of 3 pairs are for the head short; the others are left out"
    both = f"{source},{tmp_path / 'heads'}#kind"
    summary, *_ = report(settings(files, tmp_path / "both", model=both, data=data, plots=False))
    repeats = summary["labels"]["repeats"]
    assert summary["overall"]["num"] == 3 and (repeats["num_items"], repeats["contradicted"]) == (2, 0)
    with pytest.raises(ValueError, match="no head 'long'"):
        EvaluateReward(settings(files, tmp_path / "other", model=f"{tmp_path / 'heads'}#long", plots=False))


def test_the_file_of_scores_is_enough_to_compute_the_figures_again(files, tmp_path):
    rng = random.Random(0)
    told = [json.loads(line) for line in Path(files["data"]).read_text().splitlines()]
    _, rows, _, _ = report(settings(files, tmp_path / "first", plots=False))
    labels = [rng.choice([0.4, 0.8, 1.0] if row["margin"] > 0 else [0.6, 0.2]) for row in rows]  # mostly as scored
    told = [{**row, "preference": y, "margin": 2.0, "weight": 0.5} for row, y in zip(told, labels, strict=True)]
    data = write_rows(tmp_path / "soft.jsonl", told)
    summary, rows, _, _ = report(settings(files, tmp_path / "out", data=data, plots=False))
    assert [row["label"] for row in rows] == [
        {"preference": row["preference"], "margin": 2.0, "weight": 0.5, "head": None} for row in told
    ]

    def log_loss(temperature):
        losses = []
        for row in rows:
            y, d = row["label"]["preference"], row["margin"] / temperature
            losses.append(y * math.log1p(math.exp(-d)) + (1 - y) * math.log1p(math.exp(d)))
        return sum(losses) / len(losses)

    found = summary["calibration"]
    assert found["raw"]["log_loss"] == pytest.approx(log_loss(1.0))
    assert all(log_loss(found["temperature"]) < log_loss(found["temperature"] * near) for near in (0.97, 1.03))


def test_a_model_is_named_by_what_tells_it_apart():
    assert names_of(["runs/a/model"]) == ["runs/a/model"]
    assert names_of(["runs/a", "mine:count"]) == ["a", "count"]
    assert names_of(["a/rm#kind", "a/rm#short"]) == ["rm#kind", "rm#short"]


def test_micro_batches_do_not_change_scores(files, tmp_path):
    many = report(settings(files, tmp_path / "a", plots=False, max_tokens=1))[1]
    few = report(settings(files, tmp_path / "b", plots=False, max_tokens=100_000))[1]
    assert [row["margin"] for row in many] == pytest.approx([row["margin"] for row in few], abs=1e-5)


def test_the_command_line_says_where_the_report_is(files, tmp_path, capsys):
    arguments = ["--model", files["a"], "--data", files["data"], "--output", str(tmp_path / "out"), "--no-plots"]
    assert main(["evaluate", "reward", *arguments]) == 0
    said = capsys.readouterr().out
    assert "50 of 50 rows used" in said and f"report: {tmp_path / 'out' / 'report.html'}" in said
    assert main(["evaluate", "reward", *arguments]) == 1
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.skipif(not HH.exists(), reason="no ../shared/data")
def test_a_reward_model_of_real_pairs_gets_its_report(tmp_path):
    with gzip.open(HH, "rt") as file:
        rows = [row for row in map(json.loads, file) if len(row["chosen"].encode() + row["rejected"].encode()) < 400]
    train, held_out = (write_rows(tmp_path / f"{n}.jsonl", part) for n, part in enumerate((rows[:32], rows[32:64])))
    folder = model_folder(tmp_path / "model", max_position_embeddings=512)
    options = {"model": folder, "data": train, "output": str(tmp_path / "rm")}
    for _ in RewardTrainer(RewardConfig(**options, batch_size=16, max_rejected=0.2, learning_rate=1e-3)):
        pass
    config = EvaluateRewardConfig(
        model=str(tmp_path / "rm/model"),
        data=held_out,
        output=str(tmp_path / "trust"),
        reference_data=train,
        max_rejected=0.2,
    )
    summary, scores, text, _ = report(config)
    assert 0 <= summary["overall"]["low"] < summary["overall"]["accuracy"] < summary["overall"]["high"] <= 1
    assert summary["overall"]["num"] == len(scores) > 25
    assert "Prompts beside the reference data" in text and "data:image/svg+xml" in text
