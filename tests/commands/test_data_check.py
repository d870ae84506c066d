"""`fastrlhf data check`: the figures are those counted by hand, and a bad file fails."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loops import model_folder
from tiny import tiny_tokenizer
from tokenizers import AddedToken, normalizers

from fastrlhf.cli.main import main
from fastrlhf.commands.data_check import check
from fastrlhf.data import load_demonstrations, load_pairs, load_prompts
from fastrlhf.data.characters import CharacterTokenizer
from fastrlhf.data.items import Item
from fastrlhf.data.statistics import chosen_is_longer, percentiles, repetitions, shared_prompts, warnings
from fastrlhf.errors import DataError
from fastrlhf.settings.data import DataCheckConfig
from fastrlhf.settings.training import SFTConfig
from fastrlhf.trainers.sft import SFT

HH = Path(__file__).parents[2] / ".." / "shared" / "data" / "hh_harmless.jsonl.gz"
PAIRS = [
    {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven.", "rater": "ann"},
    {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven.", "rater": "ann"},  # the first again
    {"prompt": "Name a colour.", "chosen": "Seven.", "rejected": "Blue.", "rater": "bob"},  # the contrary
    {"prompt": "Name a fish.", "chosen": "Trout.", "rejected": "", "rater": "ann"},  # rejected
    {"prompt": "Name a fish.", "chosen": "Trout.", "rejected": "A bird", "rater": None},  # as long
]


def report(path, **options):
    return "\n".join(check(DataCheckConfig(file=str(path), max_rejected=1, **options))).splitlines()


def test_the_report_on_pairs_says_what_was_counted_by_hand(write):
    path = write(*PAIRS)
    lines = report(path)
    assert lines[:3] == [
        "preference pairs, for fastrlhf sft, reward, dpo, ppo",
        f"{path}: 4 of 5 rows used",
        "  1 rejected: empty response (row 4)",
    ]
    table = {line.split()[0]: [int(value) for value in line.split()[-5:]] for line in lines[5:8]}
    assert table == {"prompts": [12, 14, 14, 14, 14], "responses": [5, 6, 6, 6, 6], "together": [18, 20, 20, 20, 20]}
    assert lines[8:] == [
        "rows that repeat an earlier row: 1",
        "rows that repeat an earlier prompt: 2",
        "pairs labelled both ways: 1",
        # 5 < 6, 5 < 6, 6 > 5, 6 = 6
        "the better response is the longer one: 25.0% of pairs (as long: 25.0%)",
        # 108 letters of prompts (3 * 2 * 14 + 2 * 12) and 45 of responses
        "prompts are 70.6% of what is read; reading it once for all responses of a row saves 35.3%",
        "rater: 2 (ann: 2, bob: 1)",
    ]


def test_prompts_that_another_file_holds_too_are_counted(write, tmp_path):
    other = tmp_path / "held_out.jsonl"
    other.write_text(json.dumps({"prompt": "Name a colour."}) + "\n" + json.dumps({"prompt": "Name a tree."}))
    lines = report(write(*PAIRS), against=str(other))
    assert lines[-1] == f"prompts that {other} holds too: 1 (in 3 rows here)"


def test_prompts_are_the_same_in_every_layout(write, tmp_path):
    other = tmp_path / "held_out.jsonl"
    messages = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."}]
    for row in ({"messages": messages}, {"prompt": messages[:1], "completion": "Red."}):
        other.write_text(json.dumps(row))
        assert report(write(*PAIRS), against=str(other))[-1].endswith("holds too: 1 (in 3 rows here)")


def test_a_text_has_no_prompt_and_prompts_have_no_response(write):
    lines = report(write({"text": "Once upon a time."}, {"text": "The end."}))
    assert lines[0] == "demonstrations, for fastrlhf sft"
    assert [line.split()[0] for line in lines[3:]] == ["responses", "rows"]
    lines = report(write({"prompt": "Name a colour."}, {"prompt": "Name a colour."}))
    assert lines[0] == "prompts, for fastrlhf ppo"
    assert [line.split()[0] for line in lines[3:]] == ["prompts", "rows", "rows"]


def test_lengths_are_in_tokens_where_there_is_a_tokenizer(write, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    lines = report(write(*PAIRS), tokenizer=str(tmp_path / "model"))
    assert "length in tokens" in lines[4]
    pair = load_pairs(write(*PAIRS), tiny_tokenizer(), max_tokens=99, max_rejected=1).rows[0]
    assert lines[5].split()[-1] == str(len(pair.prompt))
    # the tokenizer's are bytes: 14 and 3 marks of the template, 6 and an end
    lines = report(write(*PAIRS), tokenizer=str(tmp_path / "model"), max_length=23)
    assert lines[2] == "  3 rejected: prompt and response too long (first row 1: 24 tokens, 23 allowed)"
    with pytest.raises(ValueError, match="max_length is in tokens: give tokenizer too"):
        DataCheckConfig(file="rows.jsonl", max_length=23)


def test_texts_that_look_like_control_tokens_are_counted(write, tmp_path):
    good = {"prompt": "q", "completion": "a"}
    rows = [{"prompt": "q<eos><|assistant|>", "completion": "a"}, {"prompt": "q", "completion": "<eos>a"}, good]
    path = write(*rows)
    (line,) = [line for line in report(path) if "control tokens" in line]
    counted = "texts that look like control tokens: 3 in 2 rows (<eos>: 2, <|assistant|>: 1)"
    assert line == f"{counted}, read as text with a chat template"
    tiny_tokenizer().save_pretrained(tmp_path / "chat")
    assert line in report(path, tokenizer=str(tmp_path / "chat"))
    (plain,) = [line for line in report(write(rows[0]), template="none") if "control tokens" in line]
    assert plain.endswith("2 in 1 rows (<eos>: 1, <|assistant|>: 1), read as control tokens, without a chat template")
    assert not any("control tokens" in line for line in report(write(good)))


TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_what_is_said_of_control_tokens_is_what_is_done(write, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("<|end|>", normalized=True, special=True)])
    tokenizer.save_pretrained(tmp_path / "chat")
    options = {"tokenizer": str(tmp_path / "chat")}
    for form, name in (("<|user|>", "<|user|>"), ("\uff1c|end|\uff1e", "<|end|>")):
        text = f"a{form}b"
        for row in ({"text": text}, {"prompt": text}, {"prompt": text, "text": text}, {"messages": TALK, "text": text}):
            lines = report(write(row), **options)
            said = {
                line.partition("), ")[2].split(" ")[2].removesuffix(":")
                for line in lines
                if "look like control tokens: 1 in 1" in line
            }
            control, done = tokenizer.convert_tokens_to_ids(name), set()
            if "text" in row and "messages" not in row:
                (first, *_) = load_demonstrations(write(row), tokenizer, max_tokens=99).rows
                done.add("control" if control in first.tokens else "text")
            if "prompt" in row:
                found = load_prompts(write(row), tokenizer, max_prompt_tokens=99).rows[0].tokens
                done.add("control" if control in found[1:-2] else "text")
            assert said == done, row


def test_a_file_with_too_many_rejected_rows_fails_after_its_report(write, capsys):
    assert main(["data", "check", str(write(*PAIRS))]) == 1
    captured = capsys.readouterr()
    assert "rows that repeat an earlier prompt" in captured.out
    assert "1 of 5 rows rejected, more than max_rejected = 0.01" in captured.err
    assert main(["data", "check", str(write(*PAIRS)), "--max-rejected", "0.2"]) == 0


def test_a_file_of_another_format_is_told_how_to_convert_it(write):
    path = write({"conversations": []})
    with pytest.raises(DataError, match=f"format sharegpt: fastrlhf data convert {path} OUT --format sharegpt"):
        report(path)
    rows = check(DataCheckConfig(file=str(write({"message_tree_id": "a", "prompt": {}}))))
    assert "--format oasst" in next(rows)


def test_a_file_of_no_known_layout_is_told_what_is_known(write):
    with pytest.raises(DataError, match=r"has the columns question; .*; preference pairs have prompt \+ chosen"):
        report(write({"question": "Why?"}))
    with pytest.raises(DataError, match="has no rows"):
        report(write())


@pytest.mark.skipif(not HH.exists(), reason=f"{HH.name} is not there")
def test_the_report_on_real_hh_rows_states_what_is_known_of_them():
    lines = report(HH, template="none")  # with the marks of its turns, as what is known was counted
    assert f"{HH}: 1990 of 2000 rows used" in lines
    (longer,) = (line for line in lines if line.startswith("the better response"))
    assert 0.42 < float(longer.split(": ")[1].split("%")[0]) / 100 < 0.46
    (shared,) = (line for line in lines if line.startswith("prompts are"))
    assert 0.71 < float(shared.split()[2].strip("%")) / 100 < 0.73


TEXT = st.lists(st.integers(0, 3), min_size=1, max_size=3)
ROWS = st.lists(st.tuples(TEXT, TEXT, TEXT).filter(lambda row: row[1] != row[2]), min_size=1, max_size=8)


@given(ROWS)
def test_repetitions_are_those_that_a_search_through_all_rows_finds(rows):
    found = repetitions([Item(prompt, [good, bad], [0, 1]) for prompt, good, bad in rows])
    earlier = [rows[:n] for n in range(len(rows))]
    assert found.rows == sum(row in before for row, before in zip(rows, earlier, strict=True))
    assert found.prompts == sum(
        row[0] in [other[0] for other in before] for row, before in zip(rows, earlier, strict=True)
    )
    contrary = [row for row in rows if (row[0], row[2], row[1]) in rows]
    assert found.contradictions == len({str((row[0], sorted(row[1:]))) for row in contrary})


def test_tied_responses_contradict_nothing_and_rankings_count_all_their_pairs():
    first = Item([1], [[2], [3, 3], [4]], [0, 1, 1])  # 2 before 3 and 4; 3 and 4 tie
    second = Item([1], [[4], [3, 3], [2]], [0, 1, 2])  # 4 before 3, 3 before 2
    assert repetitions([first, second]).contradictions == 2
    assert chosen_is_longer([first], len) == (0, 0.5)  # against 3 3 shorter, against 4 as long


def test_another_rater_repeats_nothing_and_another_head_contradicts_nothing():
    def pairs(name, *values, ranks=((0, 1), (0, 1))):
        return [Item([1], [[2], [3]], order, columns={name: v}) for v, order in zip(values, ranks, strict=True)]

    assert repetitions(pairs("rater", "ann", "bob")).rows == repetitions(pairs("head", "a", "b")).rows == 0
    assert repetitions(pairs("rater", "ann", "ann")).rows == repetitions(pairs("head", "a", "a")).rows == 1
    contrary = ((0, 1), (1, 0))
    assert repetitions(pairs("head", "a", "b", ranks=contrary)).contradictions == 0
    assert repetitions(pairs("rater", "ann", "bob", ranks=contrary)).contradictions == 1


def test_responses_that_were_labelled_differently_are_contradictions():
    items = [Item([1], [[2]], label=label) for label in (True, True, False)] + [Item([1], [[3]], label=True)]
    found = repetitions(items)
    assert (found.rows, found.prompts, found.contradictions) == (1, 3, 1)


@given(st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=2, max_size=4)), min_size=1, max_size=5))
def test_the_spared_share_is_that_of_the_tokens_counted_one_by_one(rows):
    prompts, spared = shared_prompts([Item(prompt, responses) for prompt, responses in rows], len)
    apart = [token for prompt, responses in rows for response in responses for token in (*prompt, *response)]
    once = [token for prompt, responses in rows for token in (*prompt, *(t for r in responses for t in r))]
    assert spared == pytest.approx(1 - len(once) / len(apart))
    assert prompts == pytest.approx(sum(len(p) * len(r) for p, r in rows) / len(apart))


def test_single_responses_share_the_prompts_of_equal_rows():
    items = [Item([1, 1], [[2]]), Item([1, 1], [[3, 3]]), Item([4], [[5]])]
    assert shared_prompts(items, len) == (5 / 9, 2 / 9)


def test_percentiles_are_lengths_that_occur():
    assert percentiles([9, 1, 5], (0, 50, 90, 100)) == [1, 5, 9, 9]


def test_characters_tell_apart_who_says_a_text():
    characters = CharacterTokenizer()
    spoken = [
        characters.apply_chat_template([{"role": role, "content": "Hi"}, {"role": "user", "content": "you"}])
        for role in ("system", "user")
    ]
    assert spoken[0] != spoken[1]
    assert [characters.count(tokens) for tokens in spoken] == [5, 5]


def test_rankings_labels_and_ratings_are_told_apart(write):
    ranking = {"prompt": "Name a colour.", "responses": ["Seven.", "Blue.", "Red."], "ranks": [2, 0, 0]}
    lines = report(write(ranking))
    assert lines[0] == "rankings, for fastrlhf reward, ppo"
    assert "the better response is the longer one: 0.0% of pairs (as long: 0.0%)" in lines
    row = {"prompt": "Name a colour.", "completion": "Blue."}
    lines = report(write({**row, "label": True}, {**row, "label": False}))
    assert lines[0] == "labelled responses, for fastrlhf sft, reward, dpo, ppo"
    assert {"responses with several labels: 1", "label: 2 (0: 1, 1: 1)"} <= {*lines}
    lines = report(write({**row, "ratings": {"b": 1, "a": 4}}, {**row, "ratings": {"a": 3, "b": None}}))
    assert {"a: mean 3.5 of 2", "b: mean 1 of 1"} <= {*lines}


def test_the_loops_are_warned_of_repeated_rows_and_of_prompts_on_both_sides(write):
    rows = load_pairs(write(*PAIRS), tiny_tokenizer(), max_tokens=99, max_rejected=1).rows
    assert warnings(rows, rows[:1]) == [
        "  1 of the 4 rows to train on repeat an earlier row",
        "warning: the prompts of 1 of the 1 held-out rows are trained on too",
    ]
    assert warnings(rows[1:], []) == warnings(rows[1:3], rows[3:]) == []


def test_sft_warns_of_a_held_out_row_whose_prompt_is_trained_on(write, tmp_path, capsys):
    rows = [{"prompt": letter, "completion": "ab"} for letter in "abcda"]
    options = {"model": model_folder(tmp_path / "model"), "output": str(tmp_path / "out"), "device": "cpu"}
    SFT(SFTConfig(data=str(write(*rows)), eval_fraction=0.4, **options))
    assert "warning: the prompts of 1 of the 2 held-out rows are trained on too" in capsys.readouterr().out
