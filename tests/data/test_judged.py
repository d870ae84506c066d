"""Files of responses that were judged."""

import math

import pytest
from loops import write_rows
from tiny import tiny_tokenizer

from fastrlhf.data import Reason, layout_of, load_labelled, load_pairs, load_rankings, load_ratings
from fastrlhf.errors import DataError

TOKENIZER = tiny_tokenizer(300)


def loaded(load, folder, *rows, **options):
    path = write_rows(folder / "rows.jsonl", rows)
    return load(path, TOKENIZER, template="none", **{"max_tokens": 64, **options})


def text(tokens):
    return TOKENIZER.decode(tokens)


def test_a_ranking_is_put_in_order_and_its_ranks_count_from_0(tmp_path):
    row = {"prompt": "Q", "responses": ["x", "yy", "z"], "ranks": [7, 2, 7], "head": "kind", "rater": "r1"}
    found = loaded(load_rankings, tmp_path, row)
    (ranking,) = found.rows
    assert [text(response) for response in ranking.responses] == ["yy<eos>", "x<eos>", "z<eos>"]
    assert (ranking.ranks, ranking.head, ranking.columns) == ([0, 1, 1], "kind", {"rater": "r1"})
    assert "columns not used: rater" in str(found.report)


def test_equal_responses_of_one_rank_are_a_tie(tmp_path):
    row = {"prompt": "Q", "responses": ["x", "yy", "x"], "ranks": [1, 0, 1]}
    (ranking,) = loaded(load_rankings, tmp_path, row).rows
    assert [text(response) for response in ranking.responses] == ["yy<eos>", "x<eos>", "x<eos>"]
    assert ranking.ranks == [0, 1, 1]


def test_labels_are_truths_or_probabilities(tmp_path):
    rows = [{"prompt": "Q", "completion": "A", "label": label} for label in (True, False, 0.25, 1)]
    found = loaded(load_labelled, tmp_path, *rows, {**rows[0], "weight": 3, "finished": False})
    assert [row.label for row in found.rows] == [1.0, 0.0, 0.25, 1.0, 1.0]
    assert found.rows[4].weight == 3.0 and text(found.rows[4].response) == "A"


def test_ratings_are_one_or_several_and_null_is_none(tmp_path):
    assert loaded(load_ratings, tmp_path, {"prompt": "Q", "completion": "A", "rating": 4}).rows[0].ratings == {
        "rating": 4.0
    }
    row = {"prompt": "Q", "completion": "A", "ratings": {"help": 4, "short": None, "kind": -0.5}}
    assert loaded(load_ratings, tmp_path, row).rows[0].ratings == {"help": 4.0, "kind": -0.5}


def test_a_pair_has_a_weight_a_preference_and_a_head(tmp_path):
    row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    more = {**row, "weight": 0.5, "preference": 0.8, "head": "kind", "rater": "r1"}
    plain, full = loaded(load_pairs, tmp_path, row, more).rows
    assert (plain.weight, plain.preference, plain.head) == (1.0, 1.0, None)
    assert (full.weight, full.preference, full.head, full.columns) == (0.5, 0.8, "kind", {"rater": "r1"})


BASE = {
    load_pairs: {"prompt": "Q", "chosen": "A", "rejected": "B"},
    load_rankings: {"prompt": "Q", "responses": ["A", "B"], "ranks": [0, 1]},
    load_labelled: {"prompt": "Q", "completion": "A", "label": True},
    load_ratings: {"prompt": "Q", "completion": "A", "ratings": {"help": 1}},
}


@pytest.mark.parametrize(
    ("load", "changes", "reason", "detail"),
    [
        (load_pairs, {"preference": 1.5}, Reason.BAD_PROBABILITY, "preference is 1.5"),
        (load_pairs, {"weight": -1}, Reason.BAD_ROW_WEIGHT, "-1"),
        (load_pairs, {"margin": 10**400}, Reason.BAD_MARGIN, str(10**400)),
        (load_pairs, {"margin": math.nan}, Reason.BAD_MARGIN, "nan"),
        (load_labelled, {"label": 10**400}, Reason.BAD_PROBABILITY, f"label is {10**400}"),
        (load_pairs, {"head": "a#b"}, Reason.BAD_HEAD, "'a#b'"),
        (load_rankings, {"ranks": [0, "1"]}, Reason.BAD_RANKS, "[0, '1']"),
        (load_rankings, {"ranks": [0]}, Reason.BAD_RANKS, "[0]"),
        (load_rankings, {"responses": ["A", "B", "A"], "ranks": [2, 1, 0]}, Reason.TWO_RANKS, "0 and 2"),
        (load_rankings, {"responses": ["A"], "ranks": [0]}, Reason.TOO_FEW_RESPONSES, ""),
        (load_rankings, {"responses": ["A", ""]}, Reason.EMPTY_RESPONSE, ""),
        (load_rankings, {"responses": ["A", "B" * 90]}, Reason.TOO_LONG, "92 tokens, 64 allowed"),
        (load_labelled, {"label": "yes"}, Reason.BAD_PROBABILITY, "label is 'yes'"),
        (load_labelled, {"label": None}, Reason.MISSING_COLUMN, "label"),
        (load_ratings, {"ratings": {"help": "4"}}, Reason.BAD_RATING, "help is '4'"),
        (load_ratings, {"ratings": {"help": None}}, Reason.MISSING_COLUMN, "a rating"),
        (load_ratings, {"ratings": 4}, Reason.BAD_RATING, "ratings is 4"),
        (load_ratings, {"ratings": {"a#b": 4}}, Reason.BAD_HEAD, "'a#b'"),
    ],
)
def test_a_row_that_cannot_be_used_is_rejected_with_its_reason(tmp_path, load, changes, reason, detail):
    report = loaded(load, tmp_path, BASE[load], {**BASE[load], **changes}, max_rejected=0.5).report
    assert report.rejected == {reason: [2]} and f"{reason} (row 2{': ' if detail else ''}{detail})" in str(report)


@pytest.mark.parametrize("load", BASE)
def test_columns_of_another_layout_are_told_with_those_expected(tmp_path, load):
    with pytest.raises(DataError, match=r"has the columns text; .* are read from: prompt"):
        loaded(load, tmp_path, {"text": "x"})


def test_the_columns_tell_the_layout(tmp_path):
    found = [layout_of(write_rows(tmp_path / "x.jsonl", [row])) for row in BASE.values()]
    assert found == ["pairs", "rankings", "labelled", "ratings"]
    with pytest.raises(DataError, match=r"has the columns text; expected rankings: .*data check .*x.jsonl says what"):
        layout_of(write_rows(tmp_path / "x.jsonl", [{"text": "x"}]))
