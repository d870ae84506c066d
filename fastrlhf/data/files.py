"""Rows of JSON and Parquet files: of one, of all in a folder, or of those that a glob names."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastrlhf.data.json_rows import json_rows
from fastrlhf.data.objects import rows_of
from fastrlhf.data.parquet_rows import parquet_rows
from fastrlhf.errors import DataError
from fastrlhf.settings.objects import GivenObject, RowsSource, given

__all__ = ["DataError", "RowNumber", "data_files", "folders_left_out", "read_rows"]

JSON = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
PARQUET = ".parquet"
# what `datasets` and models keep beside rows
NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
# a file is of the split that its name tells; of the training split where it tells none of these
SPLIT = re.compile(
    r"(?<![a-z])(test|testing|validation|valid|val|dev|development|eval|evaluation|held[^a-z]?out|hold[^a-z]?out)"
    r"(?:s|set|split|data)?(?![a-z])"
)
ABOUT = ("readme", "licen", "notice", "copying", "citation")  # how names of texts about rows start
WRITE = "pandas.read_{}({!r}{}).to_json('{}.jsonl', orient='records', lines=True) writes it as .jsonl"
UNPACK = "unpack it first: {} {}"


class RowNumber(int):
    """The number of a row among those of several files; as text, that in its own file, and which it is."""

    text: str

    def __new__(cls, number: int, text: str) -> RowNumber:
        place = super().__new__(cls, number)
        place.text = text
        return place

    def __str__(self) -> str:
        return self.text


def read_rows(path: RowsSource) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, row) of a .jsonl, .json or .parquet file (the first two also as .gz): the number of its line, or
    of its row, from 1. Of several files (see `data_files`) it is a `Place`.

    path: or rows themselves. Blank lines are no rows. A file of JSON holds an array of objects, or an object a line; in
    UTF-8, or in UTF-16 or UTF-32 as its first bytes say.

    Raises: DataError for a file that is missing, damaged or of another kind, and for a line that is no JSON object."""
    source = given("data", path, "rows")
    files = data_files(source)
    if len(files) < 2:
        yield from _rows(files[0]) if files else rows_of(source)
        return
    last = before = 0  # the last number so far, and that before this file: each row has a number of its own
    for file in files:
        for number, row in _rows(file):
            last = before + number
            yield RowNumber(last, f"{number} of {file}"), row
        before = last


def data_files(path: str | Path) -> list[Path]:
    """Returns the files that a path names, in sorted order: itself, those in a folder, or those that match a glob; of
    rows that are an object none.

    Raises: DataError where there is none, for a folder of several splits, and for one with rows that are not read."""
    if isinstance(path, GivenObject):
        return []
    path = Path(os.path.expanduser(path))
    if path.is_file():
        return [path]
    if path.is_dir():
        return _in_folder(path)
    if not glob.has_magic(str(path)):
        raise DataError(f"data: no file {str(path)!r}" + (" (it is no regular file)" if path.exists() else ""))
    matching = sorted(glob.glob(str(path), recursive=True))
    found = [name for name in matching if os.path.isfile(name)]
    if not found and matching:
        hint = "name one of them, or the files in them with a glob that ends with /*"
        raise DataError(f"data: {str(path)!r} matches folders only, such as {matching[0]}; {hint}")
    if not found:
        raise DataError(f"data: no file matches {str(path)!r}")
    return [Path(name) for name in found]


def folders_left_out(path: str | Path, files: Sequence[Path]) -> list[str]:
    """The folders with rows that a folder holds, or that a glob matches, besides the files that it stands for."""
    path = Path(os.path.expanduser(path))
    if path.is_file() or not files:
        return []
    inside = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    read = {file.parent for file in files}
    folders = (each for each in inside if each.is_dir() and not each.name.startswith((".", "_")) and each not in read)
    return sorted(str(each) for each in folders if any(_is_data(file) for file in each.rglob("*") if file.is_file()))


def how_to_check(path: RowsSource) -> str:
    """What says more of files than an error does."""
    return "" if isinstance(path, GivenObject) else f" (fastrlhf data check {path} says what it holds)"


def _in_folder(folder: Path) -> list[Path]:
    inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "_"))]
    files = [path for path in inside if path.is_file() and _is_data(path)]
    if not files:
        kinds = "holds no .jsonl, .json or .parquet files"
        deeper = sorted({file.parent for file in folder.rglob("*") if file.is_file() and _is_data(file)})
        if any(path.suffix == ".arrow" for path in inside):
            hint = f"; datasets.load_from_disk({str(folder)!r}).to_parquet(FILE) writes its .arrow files as one"
        else:
            hint = f"; there are some in {', '.join(map(str, deeper[:5]))}" if deeper else ""
        raise DataError(f"data: {folder} is a folder, and {kinds}{hint}")
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(_split(path), []).append(path)
    if len(splits) > 1:
        first, second, *_ = [splits[split] for split in sorted(splits)]
        raise DataError(
            f"data: the folder {folder} holds files of several splits, such as {first[0].name} and {second[0].name}; "
            f"name those of one, for instance {_glob(first)!r}"
        )
    others = [path.name for path in inside if path.is_file() and not _is_data(path) and _how_to_make_it(path)]
    others = [name for name in others if not name.lower().startswith(ABOUT)]
    if others:
        raise DataError(
            f"data: the folder {folder} holds {', '.join(others[:5])}{', ...' if len(others) > 5 else ''} too, of a "
            f"kind that is not read; name the files to be read, for instance {_glob(files)!r}"
        )
    return files


def _split(path: Path) -> str:
    found = SPLIT.search(path.name.lower())
    return found[1] if found else ""


def _glob(wanted: Sequence[Path]) -> str:
    """A short glob that names the wanted files of a folder and no others; the first of them where there is none."""
    first, last = min(path.name for path in wanted), max(path.name for path in wanted)
    start = first[: next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
    for pattern in ("train*", f"{start}*", *(f"*{suffix}" for suffix in (*JSON, PARQUET))):
        there = sorted(path for path in wanted[0].parent.glob(pattern) if path.is_file())
        if there == sorted(wanted):
            return str(wanted[0].parent / pattern)
    return str(wanted[0])


def _is_data(path: Path) -> bool:
    return path.name.lower().endswith((*JSON, PARQUET)) and path.name not in NO_ROWS


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    name = path.name.lower()
    if name.endswith(PARQUET):
        return parquet_rows(path)
    if name.endswith(JSON):
        return json_rows(path)
    kinds = ".jsonl (one JSON object a line), .json, either .gz, or .parquet"
    raise DataError(f"data: {path} must be {kinds}{_how_to_make_it(path)}")


def _how_to_make_it(path: Path) -> str:
    suffix, file, stem = path.suffix.lower(), str(path), path.with_suffix("")
    hints = {
        ".csv": WRITE.format("csv", file, "", stem),
        ".tsv": WRITE.format("csv", file, r", sep='\t'", stem),
        ".xlsx": WRITE.format("excel", file, "", stem),
        ".xls": WRITE.format("excel", file, "", stem),
        ".feather": WRITE.format("feather", file, "", stem),
        ".arrow": f"datasets.Dataset.from_file({file!r}).to_parquet('{stem}.parquet') writes it as .parquet",
        ".txt": 'a line of text would be a row {"text": ...}',
        ".ndjson": "rename it to .jsonl",
        ".zst": UNPACK.format("zstd -d", file),
        ".bz2": UNPACK.format("bzip2 -d", file),
        ".xz": UNPACK.format("xz -d", file),
        ".zip": UNPACK.format("unzip", file),
        ".tar": UNPACK.format("tar -xf", file),
        ".tgz": UNPACK.format("tar -xf", file),
    }
    return f"; {hints[suffix]}" if suffix in hints else ""
