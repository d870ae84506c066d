import json
import re

import pytest
from html_page import Page

from fastrlhf.commands.run_report import describe, verdict, write_report
from fastrlhf.evaluation import plots


def mean(value, error=0.01, num=4):
    return {"mean": value, "error": error, "num": num}


SUMMARY = {
    "kl": mean(1.5),
    "gold": {"before": mean(0.4), "after": mean(0.52), "difference": mean(0.12, 0.02)},
    "reward": {"before": mean(-1.0), "after": mean(0.5), "difference": mean(1.5)},
    **{f"{name}_{when}": 0.5 for name in ("eos_rate", "length", "distinct") for when in ("before", "after")},
    "best_of_n": {
        "n": 4,
        "gold": mean(0.5),
        "difference": mean(0.1),
        "policy_difference": mean(0.11),
        "kl_bound": 0.636,
    },
    "calibration": {"predicted": [0.6, 0.9], "observed": [0.5, 0.8], "counts": [5, 5]},
}


@pytest.fixture
def output(tmp_path):
    answers = [
        {
            "question": f"Is {n} < 5 & odd?",
            "before": "<script>alert(1)</script>",
            "after": "yes",
            **{f"{judge}_{when}": n / 10 for judge in ("gold", "reward") for when in ("before", "after")},
            "kl": 1.0,
        }
        for n in range(4)
    ]
    ppo = [
        {
            "step": step,
            "objective/scores": step,
            "objective/kl": step / 2,
            "response/length": 8,
            "response/eos_rate": 0.5,
        }
        for step in (1, 2, 3)
    ]
    accuracy = {"accuracy": 0.7, "eval/accuracy": 0.7, "eval/accuracy_low": 0.6, "eval/accuracy_high": 0.8}
    tables = {
        "data/ppo.jsonl": [{"prompt": "p"}],
        "pairs/counts.json": {"pairs": 5, "ties": 1, "empty": 1, "kept": 3},
        "sft/metrics.jsonl": [{"step": 1, "loss": 2.5}],
        "reward/metrics.jsonl": [{"step": 1, **accuracy, "eval/num_pairs": 50}],
        "ppo/metrics.jsonl": ppo,
        "evaluation/summary.json": SUMMARY,
        "evaluation/answers.jsonl": answers,
        "timing.jsonl": [{"stage": "ppo", "seconds": 2.0}, {"stage": "ppo", "seconds": 3.0}],
        "config.yaml": "seed: 0\n",
    }
    for name, content in tables.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, list):
            content = "\n".join(map(json.dumps, content)) + "\n"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


def test_the_page_needs_nothing_else_and_runs_nothing(output):
    text = write_report(output).read_text()
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe"})
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(a["src"].startswith("data:image/svg+xml;base64,") and a["alt"] for a in images)
    assert "<script>alert(1)</script>" in page.text, "what a model wrote is shown as text"
    assert "Is 0 < 5 & odd?" in page.text


def test_the_page_shows_every_plot(output):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    page = Page(write_report(output).read_text())
    titles = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(titles) == 10
    for words in ("reward model score", "KL", "length", "Calibration", "Histogram", "end by themselves"):
        assert any(words in title for title in titles), words


def test_without_matplotlib_the_page_says_that_plots_are_missing(output, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    page = Page(write_report(output).read_text())
    assert "img" not in {tag for tag, _ in page.tags}
    assert any("matplotlib is not installed" in text for text in page.text)


def test_the_verdict_counts_standard_errors(output):
    assert "+0.120 ± 0.020 (6.0 standard errors) on 4 held-out prompts" in verdict(SUMMARY)
    assert describe("evaluation", output) == verdict(SUMMARY)


def test_every_stage_has_a_line(output):
    assert describe("data", output) == "1 ppo"
    assert describe("sft", output) == "loss 2.500 in the last step"
    assert describe("pairs", output) == "3 of 5 pairs kept; dropped: 1 with equal gold reward, 1 empty"
    assert describe("reward", output) == "accuracy 70.0% on 50 held-out pairs (95 % interval 60.0% to 80.0%)"
    assert describe("ppo", output) == "score 3.00, KL 1.50 nats a response in the last step"


def test_seconds_of_a_stage_that_was_resumed_are_added(output):
    rows = re.findall(r"<tr><td>(\w+)</td>.*?<td>(\d+)</td></tr>", write_report(output).read_text())
    assert ("ppo", "5") in rows
