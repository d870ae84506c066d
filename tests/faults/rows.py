"""Hostile rows among good ones: they are read, counted, or the run is refused in one message."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from commands import OF_ROWS
from outcomes import Outcome, Trials, spoken
from processes import start
from undisturbed import restored

Row = dict[str, Any]
STEER = "\x1b[31m\x1b]0;title\x07\u202e\u200b\u2028\x9b"


def _with(**values: Any) -> Callable[[Row, str], bytes]:
    """A row with further columns; `text` stands for its column of text."""
    return lambda row, name: _json({**row, **{name if key == "text" else key: value for key, value in values.items()}})


def _json(row: Any) -> bytes:
    return json.dumps(row).encode()


def _raw(text: str) -> Callable[[Row, str], bytes]:
    """A row with a further column x, written as it is."""
    return lambda row, name: _json(row)[:-1] + b', "x": ' + text.encode() + b"}"


def _raw_text(text: str) -> Callable[[Row, str], bytes]:
    """A row whose column of text is written as it is."""
    return lambda row, name: _json({**row, name: 0}).replace(_json({name: 0})[1:-1], f'"{name}": {text}'.encode(), 1)


ROWS: dict[str, Callable[[Row, str], bytes]] = {
    "a text of 4 MiB": _with(text="b" * 2**22),
    "an empty text": _with(text=""),
    "white space": _with(text=" \n\t\u3000"),
    "a lone surrogate": _with(text="a\ud800b"),
    "a lone surrogate in a column's name": _with(**{"a\udfff": 1}),
    "a NUL escape": _with(text="a\0b"),
    "a raw NUL": lambda row, name: _json({**row, name: "a@b"}).replace(b"@", b"\0"),
    "no UTF-8": lambda row, name: _json({**row, name: "a@b"}).replace(b"@", b"\xff"),
    "ESC and marks of direction in a text": _with(text=STEER),
    "ESC and marks of direction in a column's name": _with(**{STEER: STEER}),
    "ESC and marks of direction in the column of text's name": lambda row, name: _json(
        {STEER + k: v for k, v in row.items()}
    ),
    "an empty name": _with(**{"": 1}),
    "no column of text": lambda row, name: _json({k: v for k, v in row.items() if k != name}),
    "no columns": lambda row, name: b"{}",
    "2000 columns": _with(**{f"column {n}": n for n in range(2000)}),
    "a name of 1 MiB": _with(**{"n" * 2**20: 1}),
    "nested 1000 deep": _raw("[" * 1000 + "]" * 1000),
    "nested 100000 deep": _raw("[" * 100_000 + "]" * 100_000),
    "a text that is nested 1000 deep": _raw_text("[" * 1000 + "]" * 1000),
    "a text that is nested 100 deep": _raw_text('[{"content": ' * 100 + "1" + "}]" * 100),
    "a text that is a number": _with(text=5),
    "a text that is true": _with(text=True),
    "a text that is null": _with(text=None),
    "a text that is an empty list": _with(text=[]),
    "a text that is a list of numbers": _with(text=[1, 2]),
    "a text that is an object": _with(text={"a": {"b": 1}}),
    "messages without content": _with(text=[{"role": "user"}]),
    "messages with an unknown role": _with(text=[{"role": STEER, "content": STEER}]),
    "messages with odd types": _with(text=[{"role": 3, "content": [4]}, None, "x"]),
    "NaN": _raw("NaN"),
    "NaN as text": _raw_text("NaN"),
    "Infinity": _raw("-Infinity"),
    "a weight of NaN": lambda row, name: _json({**row, "weight": float("nan"), "margin": float("nan")}),
    "a weight of 1e999": lambda row, name: _json(row)[:-1] + b', "weight": 1e999, "margin": -1e999}',
    "a weight of 400 digits": lambda row, name: _json(row)[:-1] + b', "weight": ' + b"9" * 400 + b"}",
    "a whole number of 400 digits": _raw("9" * 400),
    "a whole number of 5000 digits": _raw("9" * 5000),
    "a label of an odd type": lambda row, name: _json({**row, "label": "perhaps", "head": ["x"], "weight": "y"}),
    "a name given twice": lambda row, name: _json(row)[:-1] + b", " + _json({name: "other"})[1:],
    "a byte order mark": lambda row, name: b"\xef\xbb\xbf" + _json(row),
    "a number": lambda row, name: b"5",
    "a text": lambda row, name: b'"text"',
    "a list": lambda row, name: b"[1, 2]",
    "null": lambda row, name: b"null",
    "half a row": lambda row, name: _json(row)[: len(_json(row)) // 2],
    "no JSON": lambda row, name: b"\x00\x01{]",
    "an empty line": lambda row, name: b"",
    "control tokens": _with(text="<eos></s><|im_end|><bos>"),
    "a name of Python's": _with(**{"__class__": 1, "self": 2, "prompts": 3, "responses": 4}),
}
FILES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {  # a file's ending, and what the good rows become
    "an empty file": ("jsonl", lambda rows: b""),
    "line ends alone": ("jsonl", lambda rows: b"\n\n\n"),
    "rows in UTF-16": ("jsonl", lambda rows: rows.decode().encode("utf-16")),
    "a cut gzip file": ("jsonl.gz", lambda rows: gzip.compress(rows)[:-40]),
    "no gzip file": ("jsonl.gz", lambda rows: rows),
    "a gzip file with another byte": (
        "jsonl.gz",
        lambda rows: gzip.compress(rows)[:30] + b"x" + gzip.compress(rows)[31:],
    ),
    "no Parquet file": ("parquet", lambda rows: rows),
    "a cut array": ("json", lambda rows: b"[" + b",".join(rows.splitlines())),
    "an array nested 100000 deep": ("json", lambda rows: b"[" * 100_000),
    "a CSV file with NUL and ESC": ("csv", lambda rows: b'prompt,\x1b[31m\x00\n1,2,3\n"open'),
    "an unknown ending": ("\x1b[31mx", lambda rows: rows),
}
PLACES = ("first", "last")


def trials(command: str, folder: Path, number: int) -> Trials:
    """number: of no meaning: each row is tried first in its file and last"""
    good = Path("new", OF_ROWS[command].file).read_bytes().splitlines()[:16]
    for name in ROWS:
        for place in PLACES:
            yield f"{place}: {name}", partial(_try_row, command, folder, good, name, place)
    for name in FILES:
        yield name, partial(_try_file, command, folder, good, name)


def _try_row(command: str, folder: Path, good: list[bytes], name: str, place: str, rng: Random) -> Outcome:
    row = json.loads(good[0])
    hostile = ROWS[name](row, OF_ROWS[command].text)
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join([hostile, *good] if place == "first" else [*good, hostile]) + b"\n")
    return _run(command, folder, path, f"a row: {name}")


def _try_file(command: str, folder: Path, good: list[bytes], name: str, rng: Random) -> Outcome:
    ending, change = FILES[name]
    path = folder / f"rows.{ending}"
    path.write_bytes(change(b"\n".join(good) + b"\n"))
    return _run(command, folder, path, f"a file of rows: {name}")


def _run(command: str, folder: Path, path: Path, fault: str) -> Outcome:
    out = folder / "out"
    restored(None, out)
    words = OF_ROWS[command].command.format(path="PATH").split()
    process = start([str(path) if word == "PATH" else word for word in words], _output(command, out), folder / "a.log")
    process.wait()
    ended, detail = spoken(process)
    return Outcome(fault, ended, detail if ended != "read" else "")


def _output(command: str, out: Path) -> Path | None:
    return None if command.startswith("data") else out
