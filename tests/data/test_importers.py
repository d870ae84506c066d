"""What comes of each other format's files: the rows, and the reasons for those that are not used."""

import json
from pathlib import Path

import pytest
from imported import FIXTURES, made

from fastrlhf.data import Reason, read_rows
from fastrlhf.data.importers import IMPORTERS
from fastrlhf.errors import DataError
from fastrlhf.settings.data import FORMATS

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
OASST, GSM8K = SHARED / "oasst_en_100_trees.jsonl.gz", SHARED / "gsm8k_model_solutions.jsonl.gz"


def columns(rows, *names):
    return [tuple(row.get(name) for name in names) for row in rows]


def test_every_format_that_is_named_has_its_importer():
    assert tuple(IMPORTERS) == FORMATS
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert all(f"\n| `{name}` | " in page for name in FORMATS)


def test_oasst_trees_become_a_ranking_wherever_several_replies_are_ranked():
    rows, report = made("oasst")
    first, second = rows
    assert first == {
        "prompt": [{"role": "user", "content": "How do I boil an egg?"}],
        "responses": [
            "In water, for eight minutes.",
            "Boil water, put it in, wait eight minutes, then cool it.",
            "No idea.",
        ],
        "ranks": [1, 0, 2],
        "tree": "t1",
    }
    assert [message["role"] for message in second["prompt"]] == ["user", "assistant", "user"]
    assert second["prompt"][1]["content"].endswith("cool it.")
    assert (second["responses"], second["ranks"]) == (["Five minutes.", "Twenty."], [0, 1])
    assert report.rejected == {
        Reason.UNRANKED: [1],
        Reason.ONE_RESPONSE: [1],
        Reason.EMPTY_RESPONSE: [2],
        Reason.DELETED: [2],
    }


def test_an_oasst_rank_that_is_no_number_costs_its_ranking_alone(tmp_path):
    tree = json.loads((FIXTURES / "oasst.jsonl").read_text().splitlines()[0])
    tree["prompt"]["replies"][0]["rank"] = "first"
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps(tree))
    rows, report = made("oasst", path)
    assert [row["ranks"] for row in rows] == [[0, 1]]
    assert report.details[Reason.BAD_RATING] == "row 1: rank is 'first'"


def messages_of(tree):
    """The messages of a tree, each a row, as the Parquet files of OASST have them."""
    waiting, rows = [tree["prompt"]], []
    while waiting:
        message = waiting.pop()
        waiting += message["replies"]
        rest = {name: value for name, value in message.items() if name != "replies"}
        rows.append({"rank": None, **rest, "message_tree_id": tree["message_tree_id"]})
    return rows


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_oasst_messages_that_are_rows_of_their_own_make_the_same_rankings(tmp_path, kind):
    trees = [row for _, row in read_rows(FIXTURES / "oasst.jsonl")]
    rows = [row for tree in trees for row in messages_of(tree)]
    path = tmp_path / f"messages.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)

    def key(row):
        return json.dumps(row["prompt"])

    def sets(rows):
        return {key(row): {*zip(row["responses"], row["ranks"], strict=True)} for row in rows}

    assert sets(made("oasst", path)[0]) == sets(made("oasst")[0])


def test_oasst_messages_without_their_parent_or_an_id_of_their_own_are_not_used(tmp_path):
    row = {"message_tree_id": "t", "message_id": "a", "parent_id": None, "text": "Hi", "role": "prompter"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**row, "parent_id": "gone"}))
    with pytest.raises(DataError, match=r"nothing in .* can be used\n  1 rejected: a column is missing"):
        made("oasst", path)
    path.write_text(json.dumps(row) + "\n" + json.dumps(row))
    with pytest.raises(DataError, match="row 2: message_id 'a' is no text, or was there before"):
        made("oasst", path)


@pytest.mark.skipif(not OASST.exists(), reason=f"{OASST.name} is not there")
def test_real_oasst_trees_give_every_ranked_group_of_replies():
    rows, report = made("oasst", OASST)
    # 641 messages of the file have a rank
    assert [sum(len(row["prompt"]) == length for row in rows) for length in (1, 3, 5)] == [99, 111, 2]
    assert sum(len(row["responses"]) for row in rows) == 641
    assert {reason: len(found) for reason, found in report.rejected.items()} == {
        Reason.ONE_RESPONSE: 40,
        Reason.UNRANKED: 3,
    }
    assert all(sorted(row["ranks"]) == list(range(len(row["ranks"]))) for row in rows)


def test_ultrafeedback_ranks_by_overall_score_and_equal_scores_tie():
    rows, report = made("ultrafeedback")
    assert columns(rows, "prompt", "responses", "ranks", "scores", "models") == [
        ("Name a prime number.", ["Seven.", "Nine.", "2"], [0, 1, 0], [9, 2, 9], ["m1", "m2", "m3"])
    ]
    assert report.rejected == {Reason.BAD_RATING: [2]}
    assert report.details[Reason.BAD_RATING] == "row 2: overall_score is None"


@pytest.mark.parametrize(("score", "ranks"), [("mean", [0, 1, 1]), ("helpfulness", [0, 2, 1])])
def test_ultrafeedback_ranks_by_other_scores(tmp_path, score, ranks):
    row = json.loads((FIXTURES / "ultrafeedback.jsonl").read_text().splitlines()[0])
    row["completions"][1]["annotations"]["truthfulness"]["Rating"] = "6"  # mean 4, as that of the third
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert columns(made("ultrafeedback", path, score=score)[0], "ranks") == [(ranks,)]


def test_ultrafeedback_ranks_by_no_aspect_that_does_not_apply():
    with pytest.raises(DataError, match="truthfulness is None"):
        made("ultrafeedback", score="truthfulness")


def test_ultrafeedback_ratings_keep_every_aspect_that_applies():
    rows, report = made("ultrafeedback", ratings=True)
    assert columns(rows, "completion", "ratings") == [
        ("Seven.", {"overall": 9, "helpfulness": 5, "truthfulness": 4}),
        ("Nine.", {"overall": 2, "helpfulness": 2, "truthfulness": 1}),
        ("2", {"overall": 9, "helpfulness": 4}),
        ("Hello!", {"overall": 8, "helpfulness": 5}),
    ]
    assert report.rejected == {Reason.BAD_RATING: [2]}


def test_helpsteer_attributes_become_ratings_and_its_turns_messages():
    rows, report = made("helpsteer")
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    assert rows[0] == {
        "prompt": "What is 2 + 2?",
        "completion": "4.",
        "ratings": dict(zip(names, (4, 4, 4, 0, 0), strict=True)),
    }
    assert [(message["role"], message["content"]) for message in rows[1]["prompt"]] == [
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "What is 2 + 2?"),
    ]
    assert report.rejected == {Reason.BAD_RATING: [3]}


def test_helpsteer_preferences_become_pairs_with_their_strength():
    names = ("chosen", "rejected", "strength", "preference", "split")
    assert columns(made("helpsteer_preference")[0], *names) == [
        ("An oak.", "A stone.", 3, None, "train"),
        ("A trout.", "A fish.", 1, None, "train"),
        ("A wren.", "A lark.", 0, 0.5, "validation"),
    ]


@pytest.mark.parametrize("name", ["helpsteer_preference", "webgpt"])
def test_ties_are_kept_as_one_half_or_left_out(name):
    kept, left_out = made(name)[0], made(name, ties="reject")
    assert [row for row in kept if row.get("preference") != 0.5] == left_out[0]
    assert len(left_out[1].rejected[Reason.TIE]) == len(kept) - len(left_out[0]) == 1


def test_ultrafeedback_rankings_with_a_tie_can_be_left_out(tmp_path):
    with pytest.raises(DataError, match="1 left out: a tie"):
        made("ultrafeedback", ties="reject")


def test_pku_saferlhf_becomes_a_pair_for_each_head():
    rows, report = made("pku-saferlhf")
    assert columns(rows, "head", "chosen", "rejected", "chosen_is_safe", "rejected_is_safe") == [
        ("helpful", "With a brick.", "With its key.", False, True),
        ("harmless", "With its key.", "With a brick.", True, False),
        ("helpful", "Go to bed at one hour.", "Take pills.", True, False),
    ]
    assert report.details == {Reason.BAD_LABEL: "row 2: safer_response_id is -1"}


def test_webgpt_takes_the_sign_of_the_score_or_its_size():
    rows, report = made("webgpt")
    assert columns(rows, "prompt", "chosen", "preference", "source") == [
        ("Why is the sky blue?", "Air scatters blue light most [1].", None, "eli5"),
        ("Why do cats purr?", "They are content.", 0.5, "eli5"),
    ]
    assert report.details == {Reason.BAD_LABEL: "row 3: score_0 is 1 and score_1 is 0.5"}
    assert columns(made("webgpt", soft_labels=True)[0], "preference") == [(0.75,), (0.5,)]


def test_summaries_become_pairs_with_their_rater():
    rows, report = made("tldr")
    prompt = "SUBREDDIT: r/advice\n\nTITLE: My bike\n\nPOST: My bike was stolen, I found it on a market.\n\nTL;DR:"
    assert rows[1] == {
        "prompt": prompt,
        "chosen": " Bike.",
        "rejected": " Found my stolen bike.",
        "chosen_policy": "sup1",
        "rejected_policy": "ref",
        "rater": "bob",
        "split": "valid1",
        "batch": "b1",
        "confidence": 6,
    }
    assert rows[2]["prompt"] == "Article:\nIt rained all day.\n\nTL;DR:\n"
    assert report.rejected == {Reason.MISSING_COLUMN: [4]}


def test_a_summary_is_preferred_as_surely_as_its_rater_was():
    rows, report = made("tldr", soft_labels=True)
    assert columns(rows, "rater", "preference") == [("ann", 7 / 8), ("bob", 5 / 8)]
    assert report.details[Reason.BAD_LABEL].startswith("row 3: confidence is 8, choice 0")


def test_a_comparison_of_other_than_two_summaries_is_rejected(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = json.loads((FIXTURES / "tldr.jsonl").read_text().splitlines()[0])
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "summaries": row["summaries"][:1]}) + "\n")
    assert made("tldr", path)[1].rejected == {Reason.NOT_TWO: [2]}


def test_sharegpt_turns_become_messages():
    rows, report = made("sharegpt")
    roles = ("system", "user", "assistant")
    assert [[message["role"] for message in row["messages"]] for row in rows] == [[*roles, *roles[1:]], [*roles]]
    assert [row["messages"][0]["content"] for row in rows] == ["Be brief.", "Be kind."]
    assert report.rejected == {
        Reason.TOOL_CALL: [3],
        Reason.NOT_ALTERNATING: [4],
        Reason.ASSISTANT_NOT_LAST: [5],
        Reason.UNKNOWN_ROLE: [6],
    }


def test_gsm8k_solutions_are_labelled_right_or_wrong():
    rows, report = made("gsm8k")
    assert columns(rows, "completion", "label", "model") == [
        ("2 * 3 = 6\nA: 6", False, "6b_finetuning"),
        ("2 + 3 = 5\nA: 5", True, "175b_verification"),
        ("4 - 1 = 3\nA: 3", True, "175b_verification"),
    ]
    assert report.details == {Reason.BAD_LABEL: "row 2: 6b_finetuning: is_correct is 'yes'"}


def test_gsm8k_problems_become_demonstrations_with_their_number(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"question": "What is 600 + 600?", "answer": f"It is 1200.\n{mark}1,200"} for mark in ("#### ", "")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, report = made("gsm8k", path)
    assert found == [{"prompt": "What is 600 + 600?", "completion": "It is 1200.\n#### 1,200", "answer": "1,200"}]
    assert report.rejected == {Reason.BAD_LABEL: [2]}


@pytest.mark.skipif(not GSM8K.exists(), reason=f"{GSM8K.name} is not there")
def test_every_real_gsm8k_solution_is_used():
    rows, report = made("gsm8k", GSM8K)
    assert len(rows) == 4 * 1319 and not report.rejected
