"""Rows of a file of JSON: an object a line, or an array of objects, read piece by piece."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fastrlhf.errors import DataError

LONGEST = 2**26  # bytes of a row: more than any model reads, and little enough to be held several times over
CHUNK = 2**20  # bytes that are read of an array at a time
GZIP = b"\x1f\x8b"
BOM = codecs.BOM_UTF8
OTHERS = {  # the first bytes of files that are no text
    b"PAR1": "a Parquet file: name it .parquet",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it with zstd -d",
    b"BZh": "packed by bzip2: unpack it with bzip2 -d",
    b"\xfd7zXZ": "packed by xz: unpack it with xz -d",
    b"PK\x03\x04": "a zip file: unpack it with unzip",
    b"ARROW1": "an Arrow file: datasets.Dataset.from_file(FILE).to_parquet(OUT) writes it as Parquet",
}
WHITE = re.compile(r"[ \t\r\n]*")
WHOLE = "; a row is a whole object on one line (jq -c . FILE writes them so)"


class RepeatedKey(ValueError):
    """An object with two values of one key, of which JSON's readers keep one."""


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for n, key in enumerate(keys) if key in keys[:n])
        raise RepeatedKey(f"the key {key!r} stands twice in one object; which of its values counts is not said")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object_of)


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, row): the number of its line, or of its place in the array, from 1.

    No more of the file is held than its longest row, whatever it unpacks to.

    Raises: DataError for a file that is damaged or of another kind, and for a row that is no JSON object."""
    number, begun = 0, False
    try:
        with path.open("rb") as raw:
            text = _text(path, raw)
            while line := text.readline(LONGEST + 1):
                number += 1
                line = line.removeprefix(BOM)
                if not begun and line.lstrip().startswith(b"["):
                    yield from _array(path, line, text)
                    return
                if len(line) > LONGEST:
                    raise DataError(f"data: {path}, line {number}: {_long('line')}; is each row on a line of its own?")
                if line.strip():
                    begun = True
                    yield number, _object(path, number, line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"data: {path}, after line {number}: not a whole gzip file ({error})") from None
    except UnicodeError as error:
        encoding = getattr(error, "encoding", "other text")
        why = f"its first bytes say that it is {encoding}, but it cannot be decoded ({error})"
        raise DataError(f"data: {path}, after line {number}: {why}") from None
    except OSError as error:
        raise DataError(f"data: {path} cannot be read: {error.strerror or error}") from None


def _text(path: Path, raw: io.BufferedReader) -> IO[bytes]:
    """The file's text as UTF-8. Raises: DataError, BadGzipFile."""
    file: Any = raw
    start = raw.peek(8)[:8]
    if start.startswith(GZIP):
        file = io.BufferedReader(gzip.GzipFile(fileobj=raw))
        start = file.peek(8)[:8]
    elif start and path.suffix.lower() == ".gz":
        raise gzip.BadGzipFile(f"it begins with {start[:2]!r}")
    for begin, what in OTHERS.items():
        if start.startswith(begin):
            raise DataError(f"data: {path} is no text but {what}")
    if encoding := _encoding(start):
        return _Recoded(io.TextIOWrapper(file, encoding, newline="\n"))  # type: ignore[return-value]
    return file


def _encoding(start: bytes) -> str | None:
    """What a text is in, if it is not UTF-8: by its byte order mark, or by where its first letter has zeros."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    zeros = [byte == 0 for byte in start[:4]]
    known = {(0, 1, 0, 1): "utf-16-le", (1, 0, 1, 0): "utf-16-be", (0, 1, 1, 1): "utf-32-le", (1, 1, 1, 0): "utf-32-be"}
    return known.get(tuple(map(int, zeros)))  # type: ignore[arg-type]


class _Recoded:
    """A text of another encoding, read as UTF-8."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text = text

    def readline(self, size: int) -> bytes:
        return self.text.readline(size).encode("utf-8", "surrogatepass")

    def read(self, size: int) -> bytes:
        return self.text.read(size).encode("utf-8", "surrogatepass")


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = DECODER.decode(line.decode("utf-8", "surrogatepass"))
    except RepeatedKey as error:
        raise DataError(f"data: {path}, line {number}: {error}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number or a nesting too long
        cut = isinstance(error, json.JSONDecodeError) and (
            error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
        )
        raise DataError(f"data: {path}, line {number}: not JSON ({error}){WHOLE if cut else ''}") from None
    return _checked(path, f"line {number}", row)


def _checked(path: Path, place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"data: {path}, {place}: expected an object {{...}}, got {type(row).__name__}")
    return row


def _long(what: str) -> str:
    return f"a {what} of more than {LONGEST // 2**20} MiB"


def _array(path: Path, start: bytes, file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        pieces = _Pieces(start, file)
        pieces.take("[")
        while pieces.next() != "]" or number:
            number += 1
            yield number, _checked(path, f"row {number}", pieces.value())
            if pieces.next() != ",":
                break
            pieces.take(",")
        pieces.take("]")
        pieces.take("")
    except DataError:
        raise
    except RepeatedKey as error:
        raise DataError(f"data: {path}, row {max(1, number)}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"data: {path}, row {max(1, number)}: not JSON ({error})") from None


class _Pieces:
    """The text of a JSON value that is read on as it is needed."""

    def __init__(self, start: bytes, file: IO[bytes]) -> None:
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.scan = DECODER.raw_decode
        self.file, self.text, self.at, self.ended = file, self.decode(start), 0, False

    def read_on(self, size: int) -> bool:
        """Whether there was more."""
        if self.ended:
            return False
        new = self.file.read(size)
        self.ended = not new
        self.text, self.at = self.text[self.at :] + self.decode(new, self.ended), 0
        return not self.ended

    def next(self) -> str:
        """The next letter that is no white space; none at the end."""
        while True:
            found = WHITE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read_on(CHUNK):
                return ""

    def take(self, letter: str) -> None:
        """Goes past a letter; "" is the end. Raises: ValueError for another one."""
        found = self.next()
        if found != letter:
            raise ValueError(f"expected {letter or 'the end'!r}, got {found or 'the end'!r}")
        self.at += len(letter)

    def value(self) -> Any:
        """The next value. Raises: ValueError, RecursionError."""
        self.next()
        size = CHUNK
        while True:
            try:
                value, self.at = self.scan(self.text, self.at)
            except json.JSONDecodeError as error:  # or only the beginning is here
                if len(self.text) - self.at > LONGEST:
                    raise ValueError(f"{error}; or {_long('row')}") from None
                if not self.read_on(size):
                    raise ValueError(f"{error.msg} at the end of the file") from None
                size *= 2
            else:
                return value
