"""Conversion of files, whatever their format: what is written, what is refused, which settings there are."""

import dataclasses
import gzip
import json
import resource
from pathlib import Path

import pytest
from imported import FIXTURES, made
from loops import write_rows

from fastrlhf.cli.main import main
from fastrlhf.commands.data_convert import convert
from fastrlhf.data import Reason, read_rows
from fastrlhf.errors import DataError
from fastrlhf.settings.data import FORMATS, DataConvertConfig


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_what_is_written_reads_back_and_an_output_is_replaced_only_if_told(tmp_path, suffix):
    options = {"file": str(FIXTURES / "helpsteer_preference.jsonl"), "format": "helpsteer"}
    out = tmp_path / "new" / f"out{suffix}"
    (text,) = convert(DataConvertConfig(**options, out=str(out)))
    assert text == f"{options['file']}: rows for {out}: 3"
    assert [row for _, row in read_rows(out)] == made("helpsteer_preference")[0]
    with pytest.raises(DataError, match="is there already; --overwrite replaces it"):
        next(convert(DataConvertConfig(**options, out=str(out))))
    next(convert(DataConvertConfig(**options, out=str(out), overwrite=True, ties="reject")))
    assert len(list(read_rows(out))) == 2
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_too_many_rejected_rows_are_an_error_that_leaves_no_file(tmp_path):
    config = DataConvertConfig(file=str(FIXTURES / "gsm8k.jsonl"), out=str(tmp_path / "out.jsonl"), format="gsm8k")
    with pytest.raises(DataError, match="1 of 4 rejected, more than max_rejected"):
        next(convert(config))
    assert not list(tmp_path.iterdir())
    Path(config.out).write_text("an earlier one")
    with pytest.raises(DataError, match="1 of 4 rejected"):
        next(convert(dataclasses.replace(config, overwrite=True)))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier one"]


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_of_another_format_is_told_by_its_columns(tmp_path, format):
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(b'[{"text": "a"}]'))
    with pytest.raises(DataError, match=f"has the columns text; {format} has "):
        made(format, path)


def test_a_row_without_a_column_is_rejected_and_an_empty_file_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = (FIXTURES / "webgpt.jsonl").read_text().splitlines()
    path.write_text(lines[0] + '\n{"question": {}}\n')
    assert made("webgpt", path)[1].details == {Reason.MISSING_COLUMN: "row 2: answer_0"}
    path.write_text("")
    with pytest.raises(DataError, match="has no rows"):
        made("webgpt", path)


def test_a_ranking_that_gives_one_response_two_ranks_is_rejected(tmp_path):
    row = json.loads((FIXTURES / "ultrafeedback.jsonl").read_text().splitlines()[0])
    row["completions"][1]["response"] = row["completions"][0]["response"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"1 rejected: one response has two ranks \(row 1: 0 and 1\)"):
        made("ultrafeedback", path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "csv"}, "format must be one of gsm8k, .*, got 'csv'"),
        ({"ties": "drop"}, "ties must be one of keep, reject"),
        ({"out": "rows.json"}, "out must end in .jsonl or .jsonl.gz"),
        ({"out": "./in.jsonl"}, "out must not be the file that is read"),
        ({"soft_labels": True}, "soft_labels has no effect on format oasst; it is for tldr, webgpt"),
        ({"score": "mean"}, "score has no effect on format oasst; it is for ultrafeedback"),
        ({"format": "ultrafeedback", "score": "mean", "ratings": True}, "give ratings or score, not both"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        DataConvertConfig(**{"file": "in.jsonl", "out": "out.jsonl", "format": "oasst", **options})


def test_a_full_disk_is_named_in_a_line_and_the_old_file_stays(tmp_path, capsys):
    rows = [{"question": "q" * 4000, "answer": f"a #### {n}"} for n in range(60)]
    data, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    out.write_text("old\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a quota would
    try:
        assert main(["data", "convert", data, str(out), "--format=gsm8k", "--overwrite"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err
    assert told.startswith(f"fastrlhf data convert: error: no space left for {out}: ") and told.count("\n") == 1
    assert "--resume" not in told  # which this command has not
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"] and out.read_text() == "old\n"
