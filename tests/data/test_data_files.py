"""Rows come out of files unchanged and in an order that follows from the seed; a broken file is named."""

import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from fastrlhf.data import (
    Reason,
    batch_rows,
    layout_of,
    load_demonstrations,
    load_pairs,
    load_prompts,
    read_rows,
    shuffled,
)
from fastrlhf.errors import DataError
from fastrlhf.trainers.objectives import LOADERS as JUDGED_LOADERS

LOADERS = {"sft": load_demonstrations, "reward": load_pairs, "ppo": load_prompts}
SIZES = {"sft": {"max_tokens": 99}, "reward": {"max_tokens": 99}, "ppo": {"max_prompt_tokens": 99}}
PLAIN = tiny_tokenizer(chat=False)


def load_judged(path, *args, **options):
    """Any of the layouts that `fastrlhf reward` takes."""
    loader, _ = JUDGED_LOADERS[layout_of(path)]
    return loader(path, *args, **options)


WORD = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"prompt": "q"', "line 2: not JSON"),
        ("[1]", "line 2: expected an object .* got list"),
        ('"q"', "line 2: expected an object .* got str"),
        ("[" * 100_000, "line 2: not JSON"),
        ('{"id": ' + "1" * 5000 + "}", "line 2: not JSON"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(tmp_path, line, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "q"}}\n{line}\n')
    with pytest.raises(DataError, match=rf"rows\.jsonl, {text}"):
        list(read_rows(path))


def test_a_line_that_is_no_utf8_is_named_with_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "q"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        list(read_rows(path))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no file .*missing\.jsonl"):
        list(read_rows(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        list(read_rows(tmp_path))
    (tmp_path / "rows.csv").write_text("prompt\nq\n")
    with pytest.raises(DataError, match=r"rows.csv must be .jsonl \(one JSON object a line\), .json, "):
        list(read_rows(tmp_path / "rows.csv"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl has no rows"):
        load_prompts(tmp_path / "empty.jsonl", tiny_tokenizer(), max_prompt_tokens=9)
    packed = gzip.compress(b'{"prompt": "q"}\n' * 1000)
    for name, content in (
        ("text", b'{"prompt": "q"}\n'),
        ("cut", packed[:-20]),
        ("changed", packed[:15] + packed[16:]),
    ):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.jsonl.gz, after line .*: not a whole gzip file"):
            list(read_rows(tmp_path / f"{name}.jsonl.gz"))


def test_gzip_and_parquet_hold_the_same_rows_as_jsonl(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "q"}], "margin": 1.5},
        {"prompt": [{"role": "user", "content": "r"}], "margin": None},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    paths = [tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz"]
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    paths.append(tmp_path / "rows.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), paths[-1])
    assert all(list(read_rows(path)) == [(1, rows[0]), (2, rows[1])] for path in paths)
    paths[-1].write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"rows\.parquet, after row 0: not a whole Parquet file"):
        list(read_rows(paths[-1]))


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
def test_json_files_hold_an_array_or_lines(tmp_path, name):
    rows = [{"prompt": "q"}, {"prompt": "r"}]
    open_file = gzip.open if name.endswith(".gz") else open
    for text in (json.dumps(rows, indent=1), "\n" + json.dumps(rows), "".join(json.dumps(row) + "\n" for row in rows)):
        with open_file(tmp_path / name, "wt") as file:
            file.write(text)
        assert [row for _, row in read_rows(tmp_path / name)] == rows
    for text, error in (('[{"prompt": "q"}, 1]', "row 2: expected an object .* got int"), ("[{}", "not JSON")):
        with open_file(tmp_path / name, "wt") as file:
            file.write(text)
        with pytest.raises(DataError, match=f"{name}.*{error}"):
            list(read_rows(tmp_path / name))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'fastrlhf\[parquet\]'"):
        list(read_rows(tmp_path / "rows.parquet"))


def test_limit_and_offset_cut_out_rows_and_keep_their_numbers(write):
    path = write(
        *[{"prompt": str(n)} for n in range(3)], "", {"prompt": ""}, *[{"prompt": str(n)} for n in range(4, 9)]
    )
    loaded = load_prompts(path, PLAIN, max_prompt_tokens=9, offset=2, limit=4, max_rejected=1)
    assert [prompt.text for prompt in loaded.rows] == ["2", "4", "5"]
    assert loaded.report.num_rows == 4 and loaded.report.rejected == {Reason.EMPTY_PROMPT: [5]}
    with pytest.raises(DataError, match="no rows after the first 99"):
        load_prompts(path, PLAIN, max_prompt_tokens=9, offset=99)


@pytest.mark.parametrize("options", [{"limit": 0}, {"offset": -1}, {"max_rejected": 1.5}])
def test_impossible_options_are_refused(write, options):
    with pytest.raises(ValueError, match="max_rejected must be between 0 and 1, offset at least 0"):
        load_prompts(write({"prompt": "q"}), PLAIN, max_prompt_tokens=9, **options)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("ppo", "prompts are read from: prompt; messages; chosen [+] rejected"),
        ("sft", "demonstrations are read from: prompt [+] completion; messages; .*; text"),
        ("reward", "preference pairs are read from: prompt [+] chosen [+] rejected; chosen [+] rejected"),
    ],
)
def test_an_unknown_layout_is_told_with_what_is_accepted(write, command, text):
    with pytest.raises(DataError, match=f"rows.jsonl has the columns question, answer; {text}"):
        LOADERS[command](write({"question": "q", "answer": "a"}), PLAIN, **SIZES[command])


def test_a_column_named_like_an_argument_of_reward_functions_is_told_to_be_unused(write):
    report = load_prompts(write({"prompt": "q", "responses": "a", "finished": True}), PLAIN, max_prompt_tokens=9).report
    assert report.notes == ["columns not used, as reward functions have arguments so named: finished, responses"]


def test_the_report_says_what_is_not_used_and_when_chosen_responses_serve_as_demonstrations(write):
    row = {**WORD, "id": 1}
    notes = load_demonstrations(write(row), PLAIN, max_tokens=9).report.notes
    assert notes == ["the chosen responses of the preference pairs serve as demonstrations", "columns not used: id"]
    assert load_pairs(write({**row, "margin": 1}), PLAIN, max_tokens=9).report.notes == ["columns not used: id"]
    assert load_prompts(write({"prompt": "q", "id": 1}), PLAIN, max_prompt_tokens=9).report.notes == []


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 2**31 - 1))
def test_each_epoch_uses_every_row_once(num_rows, batch_size, seed):
    num_epochs = 3
    total = num_epochs * num_rows
    batches = [batch_rows(num_rows, batch_size, n, seed=seed, total=total) for n in range(-(-total // batch_size))]
    assert all(len(batch) == batch_size for batch in batches[:-1]) and batches[-1]
    stream = [row for batch in batches for row in batch]
    for epoch in range(num_epochs):
        assert Counter(stream[epoch * num_rows : (epoch + 1) * num_rows]) == Counter(range(num_rows))


def test_the_order_follows_from_seed_and_epoch_alone():
    assert batch_rows(50, 50, 3, seed=1) == shuffled(50, 1, 3)
    assert batch_rows(50, 20, 2, seed=1) == shuffled(50, 1, 0)[40:] + shuffled(50, 1, 1)[:10]
    assert len({tuple(shuffled(50, seed, epoch)) for seed in range(5) for epoch in range(5)}) == 25
    assert shuffled(50, 2**40) != shuffled(50, 0)


def test_orders_for_different_purposes_are_apart_and_that_of_rows_is_as_ever():
    """No two of 4 purposes, 5 seeds and 5 epochs share an order."""
    keys = [(seed, epoch, purpose) for seed in (0, 1, 2, 7, 2**31) for epoch in range(5) for purpose in range(4)]
    orders = {key: tuple(shuffled(50, *key[:2], purpose=key[2])) for key in keys}
    assert len(set(orders.values())) == 100
    for seed, epoch in ((0, 0), (7, 3)):
        assert shuffled(50, seed, epoch) == np.random.default_rng((seed, epoch)).permutation(50).tolist()
    assert batch_rows(50, 20, 2, seed=1, purpose=2) == (
        shuffled(50, 1, 0, purpose=2)[40:] + shuffled(50, 1, 1, purpose=2)[:10]
    )


@pytest.mark.parametrize("arguments", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_an_empty_stream_is_refused(arguments):
    with pytest.raises(ValueError, match="batch_rows: num_rows and batch_size must be at least 1"):
        batch_rows(*arguments, seed=0)


DOCUMENTED = re.findall(
    r"^\| `(\{.*?\})` \| (.*?) \|", (Path(__file__).parents[2] / "docs" / "data.md").read_text(), re.M
)


@pytest.mark.parametrize(("row", "readers"), DOCUMENTED)
def test_the_documented_rows_are_read_by_the_commands_that_are_named(tmp_path, row, readers):
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n")
    for command, loader in {**LOADERS, "reward": load_judged}.items():
        tokenizer = tiny_tokenizer(chat="Q: Hi" not in row)
        if command in readers.split(", "):
            assert len(loader(path, tokenizer, **SIZES[command]).rows) == 1
        else:
            with pytest.raises(DataError, match=r"are read from|; expected rankings: "):
                loader(path, tokenizer, **SIZES[command])


def test_thirteen_rows_are_documented():
    assert len(DOCUMENTED) == 13


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a", "completion": "b", "completion": "c"}\n',
        '{"prompt": "a", "completion": [{"role": "user", "role": "assistant", "completion": 1, "completion": "b"}]}\n',
        '[{"prompt": "a", "completion": "b", "completion": "c"}]\n',
    ],
)
def test_an_object_with_two_values_of_a_key_is_an_error(tmp_path, text):
    file = tmp_path / "rows.json"
    file.write_text(text)
    key = "role" if "role" in text else "completion"
    with pytest.raises(DataError, match=f"rows.json, (line|row) 1: the key '{key}' stands twice"):
        list(read_rows(file))


def test_folders_that_are_not_read_are_said(tmp_path):
    for name in ("rows1.jsonl", "rows2.d/a.jsonl", "rows3.d/b/c.jsonl", "rows4.d/readme.txt", ".rows5/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n')
    wanted = f"folders with rows that are not read: {tmp_path / 'rows2.d'}, {tmp_path / 'rows3.d'}"
    for path in (tmp_path, tmp_path / "rows*"):
        report = load_demonstrations(path, tiny_tokenizer(), max_tokens=99).report
        assert report.num_rows == 1 and wanted in report.notes
    for path in (tmp_path / "rows1.jsonl", tmp_path / "*.jsonl", tmp_path / "rows2.d"):
        assert not any(
            "folders" in note for note in load_demonstrations(path, tiny_tokenizer(), max_tokens=9).report.notes
        )
    with pytest.raises(DataError, match=r"rows\*\.d' matches folders only, such as .*rows2\.d"):
        list(read_rows(tmp_path / "rows*.d"))
