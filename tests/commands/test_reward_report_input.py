"""What `fastrlhf evaluate reward` refuses, before it scores a pair or replaces a report."""

from pathlib import Path

import pytest
from hooks import after_forward
from loops import model_folder
from tiny import tiny_tokenizer
from trust_files import make_files, report, settings

from fastrlhf.commands.reward_report.command import EvaluateReward
from fastrlhf.evaluation import plots
from fastrlhf.models.policy import RewardModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def refused(changes, error, message, files, tmp_path):
    def scored(*_):
        pytest.fail("a pair was scored")

    with after_forward(RewardModel, scored), pytest.raises(error, match=message):
        list(EvaluateReward(settings(files, tmp_path / "out", **changes)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "nowhere/at/all"}, FileNotFoundError, "nowhere/at/all"),
        ({"data": "missing.jsonl"}, ValueError, "no file 'missing.jsonl'"),
        ({"sycophancy": "{data}"}, ValueError, "sycophancy probes are read from: prompt [+] prompt_with_opinion"),
        ({"benchmark": "{data}"}, ValueError, "pair 1 has no text in column 'subset'"),
        ({"model": "{a},{a}"}, ValueError, "names a model twice"),
        ({"model": "{a},"}, ValueError, "no model between two commas"),
        ({"model": "{a}=0.5", "tokenizer": "{a}"}, ValueError, "is not one reward model or function"),
        ({"model": "{a},mean({a}|{b})"}, ValueError, "is not one reward model or function"),
        ({"num_bins": 1}, ValueError, "num_bins must be at least 2"),
        ({"max_length": 8}, ValueError, "rejected"),
    ],
)
def test_bad_input_is_named_before_anything_is_scored(changes, error, message, files, tmp_path):
    filled = {k: v.format(**files) if isinstance(v, str) else v for k, v in changes.items()}
    refused({"plots": False, **filled}, error, message, files, tmp_path)


def test_missing_matplotlib_is_named_before_anything_is_scored(files, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    refused({}, ValueError, "pip install matplotlib.*--no-plots", files, tmp_path)


def test_a_model_of_another_vocabulary_is_refused(files, tmp_path):
    other = model_folder(tmp_path / "other", vocab=320)
    RewardModel.from_pretrained(other, new_head=True).save_pretrained(other)
    tiny_tokenizer(320).save_pretrained(other)
    refused({"plots": False, "model": f"{files['a']},{other}"}, ValueError, "vocabulary", files, tmp_path)


def test_an_earlier_report_is_replaced_only_when_told(files, tmp_path):
    config = {"plots": False, "limit": 5}
    report(settings(files, tmp_path, **config))
    (tmp_path / "mine.txt").write_text("stays")
    with pytest.raises(FileExistsError, match=r"earlier report.*--overwrite"):
        EvaluateReward(settings(files, tmp_path, **config))
    own = {**config, "data": str(Path(settings(files, tmp_path, **config).output) / "scores.jsonl")}
    with pytest.raises(
        ValueError, match=r"overwrite: data reads .*scores.jsonl, which lies in .* and would be deleted"
    ):
        EvaluateReward(settings(files, tmp_path, **own, overwrite=True))
    summary, *_ = report(settings(files, tmp_path, **{**config, "limit": 6}, overwrite=True))
    assert summary["overall"]["num"] == 6 and (tmp_path / "mine.txt").exists()


def test_a_score_that_is_no_number_is_named(files, tmp_path, monkeypatch):
    monkeypatch.setattr("fastrlhf.commands.reward_report.command.can_share_prompts", lambda *_: False)
    nan = after_forward(RewardModel, lambda model, inputs, scores: scores * float("nan"))
    with nan, pytest.raises(ValueError, match=r"reward: the scores of pair 1 are \[nan, nan"):
        list(EvaluateReward(settings(files, tmp_path / "out", plots=False)))
