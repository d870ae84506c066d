"""The study of rounds: what its ways share, where they part, and its table."""

import math
import statistics

import pytest
import yaml
from loops import ROOT

from benchmarks.rounds import RESULTS, demo, main, means, read, table, toy, walk, write
from fastrlhf.commands.run import Run
from fastrlhf.settings.run import RunConfig

SMALL = {"rounds": 2, "num_pairs": 12, "num_heldout": 8, "reward_epochs": 1, "steps": 1, "batch_size": 8}


def setting(path, name):
    return yaml.safe_load(path.read_text())[name]


def test_the_ways_share_the_first_round_and_those_without_fresh_labels_keep_its_reward_model(tmp_path, one_thread):
    config = toy(tmp_path, seed=0, **SMALL)
    fresh, first, many = (list(walk(config, way)) for way in ("fresh", "first", "many"))
    assert [row["round"] for row in fresh] == [row["round"] for row in first] == [0, 1, 2]
    assert first[:2] == fresh[:2] and first[2] != fresh[2]
    assert many[0] == fresh[0], "the same policy answers the same prompts"
    assert many[1]["comparisons"] == many[2]["comparisons"] > fresh[1]["comparisons"] == first[2]["comparisons"]
    for way in ("first", "many"):
        folder = tmp_path / way
        assert setting(folder / "round-2/ppo/config.yaml", "reward") == str(folder / "round-1/reward/model")
        assert setting(folder / "round-2/ppo/config.yaml", "model") == str(folder / "round-1/ppo/model")
        assert setting(folder / "round-2/ppo/config.yaml", "reference") == config.model
    assert list(walk(config, "fresh")) == fresh, "taken up where it is"


def test_means_are_over_seeds_and_the_gain_is_paired(tmp_path):
    gold = {"fresh": (1.0, 2.0, 4.0), "first": (0.5, 1.0, 1.0)}
    rows = [
        {"seed": seed, "way": way, "round": number, "gold": number * value, "gold_error": 0.25}
        for way, values in gold.items()
        for seed, value in enumerate(values)
        for number in (0, 1)
    ]
    write(tmp_path / "toy.csv", rows)
    rows = read(tmp_path / "toy.csv")
    found = means(rows)["fresh", 1]
    assert found.mean == pytest.approx(7 / 3) and found.error == pytest.approx(
        statistics.stdev((1, 2, 4)) / math.sqrt(3)
    )
    last = table(rows).splitlines()[-1]
    assert (
        last == f"fresh - first after round 1: 1.500 ± {statistics.stdev((0.5, 1, 3)) / math.sqrt(3):.3f}, of 3 seeds"
    )
    assert means([row for row in rows if row["seed"] == 0])["fresh", 1].error == 0.25, "of a single seed: over prompts"


def test_the_table_of_the_docs_is_that_of_the_results():
    rows, page = read(RESULTS / "toy.csv"), (ROOT / "docs/feedback.md").read_text(encoding="utf-8")
    lines = table(rows).splitlines()
    assert "\n".join(lines[2:8]) + "\n\n" in page
    gains = [line.removesuffix(", of 5 seeds").partition(": ")[2] for line in lines[8:]]
    assert len(gains) == 2 and all(gain in page for gain in gains)


def test_rounds_of_the_demo_have_its_settings_and_its_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "__next__", lambda job: (next(job.names), ""))  # no stage is done
    Run(RunConfig(output=str(tmp_path / "run"), device="cpu")).folder.open()
    data = tmp_path / "run/data"
    data.mkdir(parents=True)
    for split in ("reward", "ppo", "heldout"):
        (data / f"{split}.jsonl").write_text(f'{{"prompt": "{split}"}}\n')
    config = demo(tmp_path / "rounds", 3, tmp_path / "run", rounds=4)
    assert (config.seed, config.rounds, config.gold) == (3, 4, "fastrlhf.rewards.gold:plain_answer")
    assert (tmp_path / "rounds/prompts.jsonl").read_text().count("prompt") == 3


@pytest.mark.slow
def test_on_the_toy_fresh_labels_keep_what_is_lost_without_them(tmp_path, capsys):
    assert main(["toy", "--seeds", "1", "--ways", "fresh", "first", "--into", str(tmp_path)]) == 0
    assert "| 0 | 1." in capsys.readouterr().out and (tmp_path / "toy.svg").read_text().startswith("<?xml")
    gold = means(read(tmp_path / "toy.csv"))
    assert gold["fresh", 5].mean - gold["fresh", 0].mean > 5 * gold["fresh", 5].error
    assert gold["fresh", 5].mean - gold["first", 5].mean > 5 * gold["first", 5].error
