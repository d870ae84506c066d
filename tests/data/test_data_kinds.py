"""Files as other programs leave them are read as what they are, or named in one line that says what to do."""

import bz2
import codecs
import datetime
import decimal
import gzip
import json
import lzma
import os
import random
import tracemalloc

import pytest
from loops import model_folder, write_rows
from tiny import tiny_tokenizer

from fastrlhf.cli.main import main
from fastrlhf.data import Reason, load_demonstrations, load_prompts, read_rows
from fastrlhf.data import json_rows as json_rows_module
from fastrlhf.data import parquet_rows as parquet_rows_module
from fastrlhf.data.files import data_files
from fastrlhf.data.probes import load_probes
from fastrlhf.errors import DataError

ROWS = [{"prompt": "q", "completion": "é\u2028a"}, {"prompt": "r\n", "completion": "\ufeffb 😀"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)
TEXTS = {"lines": LINES, "array": json.dumps(ROWS, ensure_ascii=False), "pretty": "\n" + json.dumps(ROWS, indent=2)}


def rows_of(path):
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".JSON.GZ"])
@pytest.mark.parametrize("form", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_every_encoding_form_and_suffix_gives_the_same_rows(tmp_path, suffix, form, encoding):
    text = TEXTS[form].encode(encoding)
    if encoding == "utf-16-be":  # Windows writes the mark too
        text = codecs.BOM_UTF16_BE + text
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(text) if suffix.lower().endswith(".gz") else text)
    assert rows_of(path) == ROWS


def test_a_gzip_file_under_another_name_and_marks_between_joined_files_are_read(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(gzip.compress(LINES.encode("utf-8-sig") * 2))
    assert rows_of(tmp_path / "rows.jsonl") == ROWS * 2


def test_arrays_are_read_piece_by_piece_wherever_they_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows_module, "CHUNK", 1)
    rows = [{"prompt": '[]{},\\"' * n, "n": [n, {"m": None}], "😀": -1.5e-7} for n in range(20)]
    for indent in (None, 1):
        (tmp_path / "rows.json").write_text("\n[\n" + json.dumps(rows, indent=indent, ensure_ascii=False)[1:] + " \n")
        assert list(read_rows(tmp_path / "rows.json")) == list(enumerate(rows, 1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", None),
        ("[{}", "row 1: not JSON .*expected ']', got 'the end'"),
        ('[{"a": 1},]', "row 2: not JSON"),
        ('[{"a": 1} {"a": 2}]', "row 1: not JSON .*expected ']', got '{'"),
        ('[{"a": 1}]\n{"a": 2}', "row 1: not JSON .*expected 'the end', got '{'"),
        ('[{"a": 1}, {"a": nope}]', "row 2: not JSON"),
        ("[1]", "row 1: expected an object .* got int"),
        ("[[[" + "[" * 100_000, "row 1: not JSON"),
        ('{\n  "prompt": "q"\n}', r"line 1: not JSON .*one line \(jq -c"),
        ('{"prompt": "q"}\n{"prom', r"line 2: not JSON .*one line \(jq -c"),
    ],
)
def test_a_damaged_array_or_object_is_named_with_its_place(tmp_path, text, said):
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_text(text)
        if said is None:
            assert rows_of(tmp_path / name) == []
        else:
            with pytest.raises(DataError, match=f"{name}, {said}"):
                rows_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", lzma.compress(b"{}"), "packed by xz: unpack it with xz -d"),
        ("a.json", bz2.compress(b"{}"), "packed by bzip2"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd\0\0", "packed by zstd"),
        ("a.jsonl", b"PK\x03\x04rest", "a zip file"),
        ("a.jsonl", b"PAR1rest", "a Parquet file: name it .parquet"),
        ("a.jsonl", b"ARROW1\0\0", "an Arrow file"),
        (
            "a.jsonl",
            "{}\n{".encode("utf-16") + b"\x00",
            "its first bytes say that it is utf-16.*, but it cannot be decoded",
        ),
        ("a.jsonl.gz", b'{"prompt": "q"}\n', "not a whole gzip file"),
        ("a.jsonl.zst", b"", "zstd -d"),
        ("a.csv", b"prompt\nq\n", r"pandas.read_csv\('.*a.csv'\).to_json\('.*a.jsonl', orient='records', lines=True\)"),
        ("a.tsv", b"", r"sep='\\t'"),
        ("a.xlsx", b"", "read_excel"),
        ("a.arrow", b"", "Dataset.from_file"),
        ("a.txt", b"", '{"text": ...}'),
        ("a.parquet", b"", "not a whole Parquet file"),
        ("a.parquet", LINES.encode(), "not a whole Parquet file"),
    ],
)
def test_what_is_no_json_is_named_with_what_to_do(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{said}") as caught:
        rows_of(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_pandas_makes_of_a_csv_file_what_the_message_says(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    pandas.DataFrame([{"prompt": "q, r", "completion": "a\nb"}]).to_csv("a.csv", index=False)
    with pytest.raises(DataError) as caught:
        rows_of("a.csv")
    exec(str(caught.value).partition("; ")[2].removesuffix(" writes it as .jsonl"), {"pandas": pandas})
    assert rows_of("a.jsonl") == [{"prompt": "q, r", "completion": "a\nb"}]


def test_a_parquet_file_cut_or_changed_anywhere_is_read_or_named(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    table = pytest.importorskip("pyarrow").Table.from_pylist([{"prompt": f"q{n}", "n": n} for n in range(300)])
    path, rng = tmp_path / "a.parquet", random.Random(0)
    parquet.write_table(table, path)
    whole = path.read_bytes()
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(40)]
    for _ in range(120):
        place = rng.randrange(len(whole))
        damaged.append(whole[:place] + rng.randbytes(4) + whole[place + 4 :])
    named = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            rows_of(path)
        except DataError as error:
            named += 1
            assert "\n" not in str(error) and "a.parquet, after row" in str(error)
    assert named >= 40


def test_values_that_parquet_has_and_json_has_not_become_those_that_json_has(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    day, moment = datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 1, 2, 3, 4)
    messages = [{"role": "user", "content": b"hi"}]
    row = {"prompt": "q", "day": day, "price": decimal.Decimal("1.25"), "image": b"\xff", "messages": messages}
    table = pa.Table.from_pylist([row]).append_column("moment", pa.array([moment], pa.timestamp("ns")))
    table = table.append_column("kind", pa.array(["a"]).dictionary_encode())
    table = table.append_column("times", pa.array([[moment]], pa.list_(pa.timestamp("us"))))
    parquet.write_table(table, tmp_path / "a.parquet")
    found = rows_of(tmp_path / "a.parquet")[0]
    assert json.loads(json.dumps(found)) == found
    assert datetime.datetime.fromisoformat(found.pop("moment")[:26]) == moment
    assert datetime.datetime.fromisoformat(found.pop("times")[0]) == moment
    messages = [{"role": "user", "content": "hi"}]
    expected = {"prompt": "q", "day": "2024-02-29", "price": 1.25, "image": "/w==", "messages": messages, "kind": "a"}
    assert found == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(DataError, match=r"a.jsonl cannot be read: Permission denied"):
        rows_of(tmp_path / "a.jsonl")


def test_an_error_of_the_disk_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read: Input/output error"):
        list(json_rows_module.json_rows(_Broken()))


class _Broken:
    suffix = ".jsonl"

    def open(self, mode):
        raise OSError(5, "Input/output error")


def test_a_folder_and_a_glob_are_read_in_sorted_order_and_a_bad_row_is_told_with_its_file(tmp_path):
    for name, rows in {"b": [{"prompt": "3"}, {"prompt": ""}], "a": [{"prompt": "1"}, {"prompt": "2"}]}.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "dataset_info.json").write_text("{\n}")
    (tmp_path / "README.md").write_text("#")
    (tmp_path / ".hidden.jsonl").write_text("x")
    for path in (tmp_path, tmp_path / "*.jsonl", tmp_path / "**" / "[ab].jsonl"):
        loaded = load_prompts(path, tiny_tokenizer(), max_prompt_tokens=9, max_rejected=1)
        assert [prompt.text for prompt in loaded.rows] == ["1", "2", "3"]
        assert loaded.report.notes == ["2 files: a.jsonl, b.jsonl"]
        assert f"(row 2 of {tmp_path / 'b.jsonl'})" in str(loaded.report)
        assert [number for number, _ in read_rows(path)] == [
            1,
            2,
            3,
            4,
        ]  # one of its own for each row: revise seeds by it
    assert data_files(tmp_path) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


def test_a_folder_without_rows_or_of_several_splits_and_a_glob_without_files_say_what_to_do(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=f"{tmp_path} is a folder, and holds no .jsonl, .json or .parquet files$"):
        rows_of(tmp_path)
    for name in ("train-0", "test-0"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", [{"prompt": name}])
    with pytest.raises(DataError, match=f"; there are some in {tmp_path}/data$"):
        rows_of(tmp_path)
    with pytest.raises(DataError, match=r"several splits, such as train-0.jsonl and test-0.jsonl; .*data/train\*'"):
        rows_of(tmp_path / "data")
    assert rows_of(tmp_path / "data" / "train*") == [{"prompt": "train-0"}]
    with pytest.raises(DataError, match=r"no file matches '.*/x\*'"):
        rows_of(tmp_path / "x*")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(DataError, match="load_from_disk"):
        rows_of(tmp_path / "saved")


@pytest.mark.parametrize(
    "other",
    [
        "evaluation",
        "held_out",
        "held-out",
        "heldout",
        "holdout",
        "hold_out_2",
        "valid",
        "dev",
        "val-1",
        "evalset",
        "Test",
    ],
)
def test_a_folder_of_training_and_other_rows_is_refused_with_a_glob_that_is_read(tmp_path, other):
    for names, glob in ((["train"], "train*"), (["train-0", "train-1"], "train*"), (["rows_a", "rows_b"], "rows_*")):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in (*names, other):
            write_rows(folder / f"{name}.jsonl", [{"prompt": name}])
        with pytest.raises(DataError, match="of several splits, such as") as error:
            rows_of(folder)
        assert f"'{folder / glob}'" in str(error.value)
        assert rows_of(folder / glob) == [{"prompt": name} for name in names]


def test_a_folder_of_two_held_out_splits_is_refused_and_words_in_names_are_no_splits(tmp_path):
    for name in ("test-0", "test-1", "validation-0"):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name}])
    with pytest.raises(DataError, match=r"test-0.jsonl and validation-0.jsonl; name those of one, .*'.*/test-\*'"):
        rows_of(tmp_path)
    (tmp_path / "names").mkdir()
    for name in ("latest", "developers", "contest", "train"):
        write_rows(tmp_path / "names" / f"{name}.jsonl", [{"prompt": name}])
    assert len(rows_of(tmp_path / "names")) == 4


@pytest.mark.parametrize("name", ["more.csv", "more.jsonl.zst", "more.arrow", "more.ndjson", "more.txt", "more.zip"])
def test_rows_of_a_kind_that_is_not_read_are_not_left_out_of_a_folder(tmp_path, name):
    for each in ("a.jsonl", "b.jsonl"):
        write_rows(tmp_path / each, [{"prompt": each}])
    for about in ("README.txt", "LICENSE.txt", "notes.md"):
        (tmp_path / about).write_text("#")
    assert len(rows_of(tmp_path)) == 2
    (tmp_path / name).write_text("prompt")
    with pytest.raises(DataError, match=rf"holds {name} too, of a kind that is not read; .*/\*.jsonl'"):
        rows_of(tmp_path)
    assert len(rows_of(tmp_path / "*.jsonl")) == 2


def test_commands_take_a_folder_and_convert_writes_into_no_file_that_it_reads(tmp_path, capsys):
    for n in range(2):
        write_rows(tmp_path / f"{n}.jsonl", [{"question": f"q{n}", "answer": f"a #### {n}"}])
    out = str(tmp_path / "out.jsonl")
    assert main(["data", "convert", str(tmp_path), out, "--format", "gsm8k"]) == 0
    assert [row["answer"] for row in rows_of(out)] == ["0", "1"]
    assert main(["data", "convert", str(tmp_path / "?.jsonl"), str(tmp_path / "0.jsonl"), "--format", "gsm8k"]) == 1
    assert "is one of the files that are read" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "out*")]) == 0


def peak_of(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_row_of_many_characters_is_rejected_in_little_memory(tmp_path):
    path, num = tmp_path / "a.jsonl.gz", 24 * 2**20
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
        file.write(json.dumps({"prompt": "q", "completion": "b" * num}) + "\n")
    report = None

    def load():
        nonlocal report
        report = load_demonstrations(path, tiny_tokenizer(), max_tokens=64, max_rejected=1).report

    assert peak_of(load) < 8 * num  # as line, as text, as value
    assert report.rejected == {Reason.TOO_LONG: [2]} and f"{num} characters, 64 tokens allowed" in str(report)


def test_a_line_a_row_of_an_array_and_a_parquet_row_without_end_are_named_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows_module, "LONGEST", 2**20)
    for name, start in (("a.jsonl.gz", b'{"prompt": "'), ("b.json.gz", b'[{"prompt": "')):
        with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
            file.write(start)
            for _ in range(64):
                file.write(b"x" * 2**20)

        def read(name=name):
            with pytest.raises(DataError, match=f"{name}, (line|row) 1: .*of more than 1 MiB"):
                rows_of(tmp_path / name)

        assert peak_of(read) < 2**24


def test_the_longest_token_bounds_the_characters_that_can_fit(write):
    """2^20 characters are always tried; beyond them a text fits only if its longest tokens could hold it."""
    tokenizer, num = tiny_tokenizer(), 16 * 100_000 + 1
    tokenizer.add_tokens(["ab" * 50_000])
    path = write({"prompt": "q", "completion": "ab" * 550_000}, {"prompt": "q", "completion": "b" * num})
    loaded = load_demonstrations(path, tokenizer, max_tokens=16, max_rejected=1)
    assert [len(row.tokens) for row in loaded.rows] == [4 + 11 + 1]  # <|user|> q <eos> <|assistant|>, and the end
    assert f"row 2: {num} characters, 16 tokens allowed" in str(loaded.report)


def test_probes_are_measured_before_they_are_tokenised(write, monkeypatch):
    path = write(
        {"prompt": "q", "prompt_with_opinion": "I say 5. q", "agreeing": "5", "disagreeing": "4"},
        {"prompt": "q", "prompt_with_opinion": "b" * 2**21, "agreeing": "5", "disagreeing": "4"},
    )
    loaded = load_probes(path, tiny_tokenizer(), max_tokens=64, max_rejected=1)
    assert len(loaded.rows) == 1 and f"row 2: {2**21} characters, 64 tokens allowed" in str(loaded.report)


@pytest.mark.parametrize("form", ["shared", "one long", "a group each"])
def test_long_rows_of_parquet_are_unpacked_few_at_a_time(tmp_path, monkeypatch, form):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    size, num = 2**20, 64
    texts = ["x" * size] * num if form != "one long" else ["q"] * 2000 + [chr(65 + n) * size for n in range(num)]
    groups = {"row_group_size": 1} if form == "a group each" else {}
    parquet.write_table(pa.table({"prompt": texts}), tmp_path / "a.parquet", compression="zstd", **groups)
    monkeypatch.setattr(parquet_rows_module, "BYTES", 4 * size)
    seen, read = [], parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches", lambda *a, **k: (seen.append(b.nbytes) or b for b in read(*a, **k))
    )
    assert [row["prompt"] for row in rows_of(tmp_path / "a.parquet")] == texts
    assert max(seen) <= 4 * size + 2**12


def test_a_judge_and_the_rows_of_label_measure_before_they_tokenise(tmp_path, capsys):
    model = model_folder(tmp_path / "m", max_position_embeddings=4096)
    path = tmp_path / "a.jsonl"
    write_rows(path, [{"prompt": "q", "responses": ["a", "b" * 9 * 2**20]}, {"prompt": "q", "responses": ["a", "bb"]}])
    options = ["--data", str(path), "--judge", str(model), "--min-mass=0", "--max-rejected=1", "--device=cpu"]
    assert main(["label", *options, "--output", str(tmp_path / "o")]) == 0
    assert "too long (row 1: 9437184 characters, so many are not read)" in capsys.readouterr().out
