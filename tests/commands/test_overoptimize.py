"""The over-optimisation study: its stages on a tiny model, a run that is stopped, and the toy on which gold falls."""

import csv
import json
import math
from pathlib import Path

import pytest
from hooks import interrupted_in_step
from loops import model_folder, write_rows

from benchmarks.overoptimization import config as toy
from fastrlhf.cli.main import main
from fastrlhf.commands.overoptimize import PRODUCTS, Overoptimize
from fastrlhf.commands.overoptimize_report import METHODS, points_of, summarise, verdict
from fastrlhf.evaluation.labels import split_by_prompt
from fastrlhf.runtime.jsonl import read_jsonl
from fastrlhf.settings.best_of_n import OveroptimizeConfig

pytestmark = pytest.mark.usefixtures("one_thread")
GOLD = """
def early(prompts, responses, *, response_ids):
    return [sum(token < 150 for token in ids) + 0.01 * (ids[0] % 7) for ids in response_ids]


def by_topic(prompts, responses, *, topic):
    return [float(len(response)) for response in responses]
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "over_gold.py").write_text(GOLD)
    monkeypatch.syspath_prepend(tmp_path)
    return {
        "model": model_folder(tmp_path / "model"),
        "data": write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"prompt {n}"} for n in range(6)]),
        "eval_data": write_rows(tmp_path / "heldout.jsonl", [{"prompt": f"prompt {n}"} for n in range(5, 9)]),
        "output": str(tmp_path / "study"),
        "gold": "over_gold:early",
        "n": 6,
        "num_pairs": 24,
        "flip": 0.4,
        "reward_batch_size": 8,
        "reward_learning_rate": 1e-3,
        "steps": 3,
        "eval_every": 2,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "max_new_tokens": 6,
        "device": "cpu",
    }


def arguments(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def results(output):
    return {name: (Path(output) / name).read_bytes() for name in ("points.csv", "summary.json", "pairs/train.jsonl")}


def test_a_study_leaves_its_points_and_a_stopped_one_comes_to_the_same(settings, tmp_path, monkeypatch, capsys):
    whole = dict(Overoptimize(OveroptimizeConfig(**settings)))
    assert list(whole) == list(PRODUCTS)
    output = Path(settings["output"])
    rows = list(csv.DictReader((output / "points.csv").read_text().splitlines()))
    assert [row["effort"] for row in rows] == ["1", "2", "3", "4", "6", "0", "2", "3"]
    assert float(rows[0]["gold"]) == pytest.approx(0, abs=1e-6) == float(rows[0]["proxy"])
    assert float(rows[5]["kl"]) == 0 and float(rows[6]["distance"]) == pytest.approx(
        math.sqrt(max(float(rows[6]["kl"]), 0)), abs=1e-4
    )
    pairs = read_jsonl(output / "pairs/train.jsonl")
    held_out = read_jsonl(output / "pairs/heldout.jsonl")
    assert len({row["prompt"] for row in pairs} | {row["prompt"] for row in held_out}) == 6  # of 6, each often
    assert not {row["prompt"] for row in pairs} & {row["prompt"] for row in held_out} and held_out
    evaluated = read_jsonl(output / "proxy/metrics.jsonl")[-1]
    assert evaluated["eval/num_pairs"] == len(held_out)
    turned = sum(row["gold_chosen"] < row["gold_rejected"] for row in pairs)
    assert 0 < turned < len(pairs) / 2
    assert "<svg" in (output / "report.html").read_text()
    changed = {**settings, "output": str(tmp_path / "stopped")}
    with interrupted_in_step(2, tmp_path / "stopped/ppo/metrics.jsonl"):
        assert main(["overoptimize", *arguments(changed)]) == 130
    told = capsys.readouterr()
    assert told.err.splitlines()[-1].endswith(f"--config {changed['output']}/config.yaml --resume")
    assert "warning: 1 of the 4 prompts of" in told.out
    assert main(["overoptimize", *arguments(changed), "--resume"]) == 0
    assert results(changed["output"]) == results(settings["output"])


def test_of_pairs_on_prompts_of_their_own_the_last_tenth_is_held_out():
    rows = [{"prompt": f"prompt {n}"} for n in range(30)]
    assert split_by_prompt(rows, 0.1) == (rows[:27], rows[27:])
    assert split_by_prompt(rows[:2], 0.1) == (rows[:1], rows[1:2])
    with pytest.raises(ValueError, match="3 pairs are left, all on one prompt"):
        split_by_prompt(rows[:1] * 3, 0.1)


def test_a_study_of_many_responses_has_points_a_factor_apart(tmp_path):
    point = {"kl": 1.0, "proxy": 0.0, "proxy_error": 0.1, "gold": 0.0, "gold_error": 0.1}
    unit = {"mean": 0.0, "deviation": 1.0}
    found = {"points": [{"k": k, **point} for k in range(1, 1101)], "moments": {"proxy": unit, "gold": unit}}
    (tmp_path / "best_of_n.json").write_text(json.dumps(found))
    (tmp_path / "ppo.json").write_text(json.dumps({"points": []}))
    efforts = [row["effort"] for row in points_of(tmp_path)]
    assert efforts[:6] == [1, 2, 3, 4, 6, 8] and efforts[-3:] == [724, 1024, 1100]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"gold": "over_gold:late"}, "has no function 'late'"),
        ({"eval_data": "nowhere.jsonl"}, "no file 'nowhere.jsonl'"),
        ({"ppo": "nowhere.yaml"}, "no file 'nowhere.yaml'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"ppo": "other.yaml"}, "other.yaml: output follows from the command that reads it, leave it out"),
        ({"gold": "over_gold:by_topic", "data": "more_topics.jsonl"}, "argument: 'topic'"),
        ({"data": "topics.jsonl"}, "topics.jsonl has one prompt; the proxy learns from some and is measured on others"),
        ({"eval_data": "topics.jsonl"}, "has 1 prompt; standard errors take at least 2"),
    ],
)
def test_bad_input_is_named_and_leaves_no_folder(settings, tmp_path, capsys, changes, text):
    (tmp_path / "other.yaml").write_text("output: elsewhere\n")
    topics = [{"prompt": prompt, "topic": "t"} for prompt in "pq"]
    write_rows(tmp_path / "topics.jsonl", topics[:1]), write_rows(tmp_path / "more_topics.jsonl", topics)
    assert main(["overoptimize", *arguments({**settings, **changes})]) in (1, 2)
    assert text in capsys.readouterr().err and not (tmp_path / "study").exists()


@pytest.mark.slow
def test_on_the_toy_gold_peaks_and_falls_while_the_proxy_rises(tmp_path):
    study = Overoptimize(toy(tmp_path))
    list(study)
    summary = summarise(points_of(study.output))
    for method in ("best_of_n", "ppo"):
        found = summary[method]
        assert found["best"]["gold"] > 5 * found["best"]["gold_error"], "gold rises first"
        assert found["fall_in_errors"] > 5, "and then falls"
        assert found["proxy_rise_after_best"] > 0, "while the proxy goes on rising"
    assert json.loads((study.output / "summary.json").read_text())["ppo"]["fit"]["beta"] > 0


def test_a_fall_is_told_with_what_was_chosen_and_unknown_errors_as_such():
    def rows(golds):
        means = {"proxy": 0.0, "proxy_error": 0.1, "gold_error": 0.1, "effort": 1}
        return [
            {**means, "method": method, "kl": kl, "distance": kl, "gold": sum(g) / max(len(g), 1), "gold_of_prompts": g}
            for method in METHODS
            for kl, g in enumerate(golds)
        ]

    found = summarise(rows([[1.0, 5.0, 1.0, 5.0], [4.0, 2.0, 4.0, 0.0], [0.0, 0.0, 2.0, 2.0]]))
    assert (
        found["ppo"]["num_points"] == 3 and found["ppo"]["fall"] == 0 and "gold_of_prompts" not in found["ppo"]["best"]
    )
    assert found["ppo"]["fall_error"] == pytest.approx((sum(x * x for x in (1, 2, -1, -2)) / 3 / 4) ** 0.5)
    assert "PPO: of 3 points gold is best" in verdict(
        found
    ) and "a fall of 0.00 ± 0.913 (0.0 standard errors)" in verdict(found)
    assert "± ? (one prompt, so its error is unknown)" in verdict(summarise(rows([[1.0], [0.5]])))
    assert "a fall of unknown size" in verdict(summarise(rows([[], []])))
