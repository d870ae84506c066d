"""The printed figures are the measured ones."""

import pytest

from benchmarks import tables


def test_the_tables_of_both_pages_are_what_the_csv_files_say():
    for path, text in tables.texts():
        assert path.read_text() == text, f"{path.name} is stale: python -m benchmarks.tables"


def test_every_headline_was_measured():
    assert [line.what for line, ratio in tables.headlines(tables.read()) if ratio is None] == []


def test_a_page_without_marks_is_not_overwritten():
    with pytest.raises(SystemExit, match="marks of 'speed'"):
        tables.between("text", "speed", "table")
