"""`fastrlhf label`: rows in, labelled pairs out, and a run that is stopped."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_server import serving
from judging import RUBRIC, chat, completion, sigmoid
from loops import model_folder, write_rows
from tiny import tiny_tokenizer

from fastrlhf.cli.main import main
from fastrlhf.commands.feedback import label as label_module
from fastrlhf.commands.feedback.label import Label
from fastrlhf.data import Reason, load_pairs
from fastrlhf.errors import DataError
from fastrlhf.generation.server import ServerError
from fastrlhf.runtime.jsonl import read_jsonl, with_checksum
from fastrlhf.settings.feedback import LabelConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def server():
    with serving({"/v1/chat/completions": chat, "/v1/completions": completion}) as running:
        yield running


@pytest.fixture
def settings(tmp_path, server):
    rows = [
        {"prompt": f"q{n}", "responses": ["a" * (n % 4 + 1), "b" * 2], "split": "x", "ranks": [1, 2]} for n in range(10)
    ]
    (tmp_path / "rubric.txt").write_text(RUBRIC)
    return {
        "judge": server.url,
        "judge_model": "policy",
        "data": write_rows(tmp_path / "rows.jsonl", rows),
        "output": str(tmp_path / "labels"),
        "rubric": str(tmp_path / "rubric.txt"),
        "judge_batch": 4,
    }


def run(settings, **changes):
    return list(Label(LabelConfig(**{**settings, **changes})))


def test_rows_are_pairs_with_soft_labels_and_a_summary_tells_the_bias(settings):
    out = run(settings)
    assert out[:3] == ["4 of 10 pairs judged", "8 of 10 pairs judged", "10 of 10 pairs judged"]
    rows = read_jsonl(Path(settings["output"]) / "pairs.jsonl")
    # a response of 1 against one of 2; equal lengths are ties: what is shown first wins in both orders
    assert [len(row["chosen"]) for row in rows] == [2, 3, 4, 2, 3, 4, 2]
    assert rows[0] == {
        "prompt": "q0",
        "chosen": "bb",
        "rejected": "a",
        "preference": pytest.approx((sigmoid(1.5) + sigmoid(0.5)) / 2),
        "orders": [pytest.approx(sigmoid(1.5)), pytest.approx(sigmoid(0.5))],
        "rater": "policy",
        "chosen_finished": True,
        "rejected_finished": True,
        "split": "x",
    }
    loaded = load_pairs(Path(settings["output"]) / "pairs.jsonl", tiny_tokenizer(), max_tokens=64)
    assert [pair.preference for pair in loaded.rows] == [row["preference"] for row in rows]
    summary = json.loads((Path(settings["output"]) / "summary.json").read_text())
    assert (summary["rows"], summary["pairs"], summary["ties"], summary["rejected"]) == (10, 7, 3, {})
    assert summary["order_decides"] == summary["order_decides_for_first"] == 0.3
    odds = [n % 4 + 1 - 2 for n in range(10)]
    first = sum(sigmoid(odd + 0.5) + sigmoid(-odd + 0.5) for odd in odds) / 20
    assert summary["mean_first"] == pytest.approx(first)
    assert "agreement" not in summary


def test_pairs_are_labelled_anew_and_compared_with_their_labels(settings, tmp_path):
    rows = [
        {"prompt": "q", "chosen": "aaa", "rejected": "b", "margin": 3, "rejected_finished": False},
        {"prompt": "q", "chosen": "a", "rejected": "bb"},
        {"prompt": "q", "chosen": "aa", "rejected": "bb"},
    ]
    run(settings, data=write_rows(tmp_path / "pairs.jsonl", rows), rater="me")
    new = read_jsonl(Path(settings["output"]) / "pairs.jsonl")
    assert [(row["chosen"], row["agrees"], row["rater"]) for row in new] == [("aaa", True, "me"), ("bb", False, "me")]
    assert "margin" not in new[0] and new[0]["rejected_finished"] is False
    summary = json.loads((Path(settings["output"]) / "summary.json").read_text())
    assert summary["agreement"]["share"] == 0.5  # one, none, and half of the tie


def test_labels_of_labels_keep_nothing_of_the_old_ones(settings, tmp_path):
    run(settings)
    old = read_jsonl(Path(settings["output"]) / "pairs.jsonl")
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"], "gold_chosen": 1} for row in old]
    run(settings, data=write_rows(tmp_path / "again.jsonl", turned), output=str(tmp_path / "again"))
    new = read_jsonl(tmp_path / "again/pairs.jsonl")
    assert [row.pop("agrees") for row in new] == [False] * len(old)
    assert new == old


def test_a_resumed_run_may_reject_more_but_not_read_other_rows(settings, server):
    server.change = lambda body, answer: (400, "no") if "q3" in str(body) else answer
    with pytest.raises(DataError, match="mend them, or raise max_rejected to go on without them"):
        run(settings)
    asked = len(server.requests)
    run(settings, max_rejected=0.1, resume=True)
    assert len(server.requests) == asked + 1 + 2 * 6  # a short question, and the rest alone
    assert len(read_jsonl(Path(settings["output"]) / "verdicts.jsonl")) == 10
    write_rows(settings["data"], read_jsonl(settings["data"])[::-1])
    with pytest.raises(ValueError, match="has changed since the run began"):
        run(settings, max_rejected=0.1, resume=True)


def test_a_stopped_run_asks_about_the_rest_alone_and_ends_the_same(settings, server, tmp_path):
    run(settings, output=str(tmp_path / "whole"))
    stopped = iter(Label(LabelConfig(**settings)))
    next(stopped)
    stopped.close()
    verdicts = Path(settings["output"]) / "verdicts.jsonl"
    later = with_checksum('{"step": 2, "row": 5, "orders": [0.3, 0.4], "masses": [1, 1]}')
    verdicts.write_text(verdicts.read_text() + later + '\n{"step"')
    server.requests.clear()
    run(settings, resume=True)
    assert len(server.requests) == 1 + 2 * 6
    for name in ("verdicts.jsonl", "pairs.jsonl", "summary.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (Path(settings["output"]) / name).read_bytes(), name


def test_the_command_answers_prompts_and_lets_a_local_model_judge(tmp_path, capsys):
    model = model_folder(tmp_path / "model")
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"question {n}", "topic": n} for n in range(4)])
    options = [f"--judge={model}", f"--policy={model}", f"--data={data}", "--min-mass=0", "--max-new-tokens=5"]
    options += [f"--rubric={write_short(tmp_path)}", "--device=cpu"]
    assert main(["label", *options, f"--output={tmp_path / 'labels'}"]) == 0
    assert f"pairs: {tmp_path / 'labels' / 'pairs.jsonl'}" in capsys.readouterr().out
    rows, answers = (read_jsonl(tmp_path / "labels" / f"{name}.jsonl") for name in ("pairs", "answers"))
    assert [row["topic"] for row in rows] == [0, 1, 2, 3]
    for row, drawn in zip(rows, answers, strict=True):
        assert {row["chosen"], row["rejected"]} == set(drawn["responses"])
        assert row["preference"] >= 0.5 and sum(row["orders"]) / 2 == pytest.approx(row["preference"])
    assert main(["label", *options, f"--output={tmp_path / 'again'}"]) == 0
    assert read_jsonl(tmp_path / "again" / "pairs.jsonl") == rows


def test_samples_of_a_policy_that_are_the_same_are_left_out_and_no_fault(tmp_path, monkeypatch):
    model = model_folder(tmp_path / "model")
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"question {n}"} for n in range(4)])
    given = {"policy": model, "judge": model, "data": data, "min_mass": 0.0, "max_new_tokens": 5, "device": "cpu"}
    texts = ["a", "a", "b", "c", "d", "d ", "e", "f"]
    drawn = SimpleNamespace(texts=texts, finished=torch.ones(8, dtype=torch.bool))
    monkeypatch.setattr(label_module, "answer", lambda *_, **__: drawn)
    config = LabelConfig(**given, rubric=str(write_short(tmp_path)), output=str(tmp_path / "out"))
    list(Label(config))
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["rejected"] == {Reason.SAME_SAMPLES: 2}
    assert {row["prompt"] for row in read_jsonl(tmp_path / "out/pairs.jsonl")} <= {"question 1", "question 3"}


def write_short(folder):
    (folder / "short.txt").write_text(RUBRIC)
    return folder / "short.txt"


def test_rows_without_an_answer_are_rejected_by_reason(settings, server, tmp_path):
    def refuse(body, answer):
        return (400, "too long") if "q3" in body["messages"][0]["content"] else answer

    server.change = refuse
    rows = [{"prompt": f"q{n}", "responses": ["aa", "b"]} for n in range(4)]
    rows += [{"prompt": "q", "responses": ["a"]}, {"prompt": "q", "responses": ["a", "a "]}, {"prompt": "q"}]
    data = write_rows(tmp_path / "odd.jsonl", rows)
    with pytest.raises(DataError, match=r"3 of 7 rows rejected.*\n(.*\n)*.*not two responses \(row 5: 1\)"):
        run(settings, data=data)
    run(settings, data=data, max_rejected=0.7)
    summary = json.loads((Path(settings["output"]) / "summary.json").read_text())
    reasons = (Reason.MISSING_COLUMN, Reason.NOT_TWO, Reason.SAME, Reason.REFUSED)
    assert summary["rejected"] == dict.fromkeys(reasons, 1)
    assert summary["pairs"] == 3


def test_labels_that_are_all_ties_warn(settings):
    with pytest.warns(UserWarning, match="pairs.jsonl is empty: all 10 judged pairs are ties .tie_margin 0.5."):
        *_, text = run(settings, tie_margin=0.5)
    assert text.startswith("0 pairs, 10 ties; mean preference ")


def test_where_the_judge_says_something_else_the_advice_is_min_mass_and_following_it_helps(settings):
    with pytest.raises(DataError, match=r"4 of 10 rows rejected, .*; lower min_mass \(0 takes .*without them\n"):
        run(settings, min_mass=0.95)
    run(settings, min_mass=0, overwrite=True)
    assert read_jsonl(Path(settings["output"]) / "pairs.jsonl")


def test_a_judge_that_rejects_too_much_is_not_asked_on(settings, server):
    server.change = lambda body, answer: (400, "too long") if "|" in str(body) else answer
    with pytest.raises(DataError, match=r"4 of 10 rows rejected.*\n(.*\n)*.*too long"):
        run(settings)
    assert len(server.requests) == 1 + 8 + 8  # a short question at the start and after each refusal
    with pytest.raises(DataError, match="no pair has a label"):
        run(settings, max_rejected=1, overwrite=True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda *_: {"choices": []}, "told no top log-probabilities of a token"),
        (lambda *_: {"choices": [{"logprobs": None}]}, "told no top log-probabilities of a token"),
        (lambda *_: (500, "out of memory"), "answered 500: out of memory"),
    ],
)
def test_a_server_that_fails_is_named(settings, server, change, text):
    server.change = change
    with pytest.raises(ServerError, match=text):
        run(settings)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"judge_model": None}, "is a server: name a model that it serves by judge_model"),
        ({"judge": "folder"}, "judge_model is the model of a server, whose URL is the judge"),
        ({"judge_model": "other"}, "serves base, policy, not other"),
        ({"judge": "http://127.0.0.1:1"}, "cannot be reached"),
        ({"answers": ("A", " A")}, "answers must be two texts"),
        ({"answers": ("A",)}, "answers must be two texts"),
        ({"rubric": "nowhere.txt"}, "rubric: nowhere.txt cannot be read"),
        ({"min_mass": 1.5}, "min_mass must be between 0 and 1"),
        ({"data": "nowhere.jsonl"}, "no file 'nowhere.jsonl'"),
        ({"judge_key_file": "nowhere.txt"}, "judge_key_file: nowhere.txt cannot be read"),
    ],
)
def test_what_cannot_be_done_is_named_before_anything_is_written(settings, changes, text):
    with pytest.raises((ValueError, ServerError), match=text):
        run(settings, **changes)
    assert not Path(settings["output"]).exists()


def test_a_rubric_with_some_placeholders_needs_them_all(settings, tmp_path):
    (tmp_path / "half.txt").write_text("Which is better, {response_1} or {response_2}?")
    with pytest.raises(ValueError, match=r"a question needs \{prompt\} in it"):
        run(settings, rubric=str(tmp_path / "half.txt"))


def test_prompts_alone_need_a_policy(settings, tmp_path):
    with pytest.raises(DataError, match="prompts alone are answered with --policy"):
        run(settings, data=write_rows(tmp_path / "prompts.jsonl", [{"prompt": "q"}]))
