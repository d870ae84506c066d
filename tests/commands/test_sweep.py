"""The sweep: its points against the candidates they are chosen from, PPO for each weight, and what it refuses."""

import csv
import json

import numpy as np
import pytest
from searches import arguments, search_settings

from fastrlhf.cli.main import main
from fastrlhf.rewards.combine import parse_reward
from fastrlhf.runtime.jsonl import read_jsonl
from fastrlhf.settings.best_of_n import SweepConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def given(tmp_path, monkeypatch):
    settings = search_settings(tmp_path, monkeypatch)
    changes = {"output": str(tmp_path / "sweep"), "first": "best_rules:early", "second": "best_rules:odd", "n": 6}
    others = {name: settings[name] for name in settings if name not in ("reward", "gold", "keep_unfinished")}
    return {**others, **changes, "weights": "0,0.5,1"}


def test_each_weight_chooses_by_the_standardised_sum(given, tmp_path, capsys):
    assert main(["sweep", *arguments(given)]) == 0
    scores = [row["scores"] for row in read_jsonl(tmp_path / "sweep/candidates.jsonl")]
    first, second = (np.array([row[name] for row in scores]) for name in ("first", "second"))
    a, b = (values / values.var(1, ddof=1).mean() ** 0.5 for values in (first, second))
    summary = json.loads((tmp_path / "sweep/sweep.json").read_text())
    start, *points = summary["points"]
    assert (start["first"], start["second"]) == pytest.approx((first.mean(), second.mean()))
    for weight, point in zip((0, 0.5, 1), points, strict=True):
        chosen = (weight * a + (1 - weight) * b).argmax(1)[:, None]
        for name, values in (("first", first), ("second", second)):
            best = np.take_along_axis(values, chosen, 1)[:, 0]
            assert point[name] == pytest.approx(best.mean())
            assert point[f"{name}_error"] == pytest.approx(best.std(ddof=1) / len(best) ** 0.5)
    # what is paid for most is had most
    assert points[0]["second"] >= points[2]["second"] and points[2]["first"] >= points[0]["first"]
    table = list(csv.DictReader((tmp_path / "sweep/sweep.csv").read_text().splitlines()))
    assert [row["weight"] for row in table] == ["", "0", "0.5", "1"]
    text = capsys.readouterr().out.split("--reward: ")[1].splitlines()[0]
    value = parse_reward(text.replace("WEIGHT", "2"))
    assert [part.form for part in value.parts] == ["standard", "standard"]
    assert value.parts[0].numbers == pytest.approx((first.mean(), first.var(1, ddof=1).mean() ** 0.5), rel=1e-4)


def test_ppo_is_run_for_each_weight_and_a_stopped_sweep_goes_on(given, tmp_path, capsys):
    ppo = tmp_path / "ppo.yaml"
    ppo.write_text("steps: 2\nbatch_size: 4\nlearning_rate: 1e-3\n")
    given = {**given, "weights": "0,1", "ppo": str(ppo), "n": 2}
    assert main(["sweep", *arguments(given)]) == 0
    before = (tmp_path / "sweep/sweep.json").read_bytes()
    points = [point for point in json.loads(before)["points"] if point["method"] == "ppo"]
    assert [point["weight"] for point in points] == [0, 1] and all(point["kl"] != 0 for point in points)
    assert points[0]["kl"] != points[1]["kl"]
    assert len(read_jsonl(tmp_path / "sweep/ppo/1/metrics.jsonl")) == 2
    (tmp_path / "sweep/ppo/1.json").unlink()
    assert main(["sweep", *arguments(given), "--resume"]) == 0
    assert (tmp_path / "sweep/sweep.json").read_bytes() == before
    ppo.write_text(ppo.read_text().replace("1e-3", "2e-3"))
    (tmp_path / "sweep/ppo/1.json").unlink()
    assert main(["sweep", *arguments(given), "--resume"]) == 1
    assert "learning_rate was 0.001 and is 0.002" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"first": "best_rules:early=2"}, "first: give one reward without a weight, got 'best_rules:early=2'"),
        ({"second": "best_rules:early,best_rules:short"}, "second: give one reward without a weight"),
        ({"ppo": "nowhere.yaml"}, "config: no file 'nowhere.yaml'"),
        ({"ppo": "other.yaml"}, "other.yaml: reward follows from the command that reads it, leave it out"),
        ({"limit": 1}, "has 1 prompt; standard errors take at least 2"),
    ],
)
def test_bad_input_is_named_and_leaves_no_folder(given, tmp_path, capsys, changes, text):
    (tmp_path / "other.yaml").write_text("reward: best_rules:early\n")
    assert main(["sweep", *arguments({**given, **changes})]) == 1
    assert text in capsys.readouterr().err and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("weights", "text"),
    [("0,much", "'much' is no number"), ("0,2", "between 0 and 1, got 2"), ("0.5,.5", "one is given twice")],
)
def test_weights_are_shares(weights, text):
    with pytest.raises(ValueError, match=text):
        SweepConfig(model="m", data="d", output="o", first="a", second="b", weights=weights)
