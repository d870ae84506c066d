"""`fastrlhf data convert`: another format's file as rows of ours."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastrlhf.data.conversations import conversation, prompt_of, text_of
from fastrlhf.data.files import data_files, read_rows
from fastrlhf.data.importers import IMPORTERS, Format
from fastrlhf.data.judged import check_ranks
from fastrlhf.data.report import Reason, Rejected, Report
from fastrlhf.errors import DataError
from fastrlhf.runtime.atomic_io import write_file
from fastrlhf.runtime.jsonl import as_json
from fastrlhf.settings.data import DataConvertConfig

Row = dict[str, Any]


def convert(config: DataConvertConfig) -> Iterator[str]:
    """Writes config.out, whole or not at all; yields what became of the rows of config.file.

    Raises: DataError for a file of another format, one of which nothing or too little can be used, and an output that
    is there."""
    out = Path(config.out)
    if out.resolve() in [file.resolve() for file in data_files(config.file)]:
        raise DataError(f"data: {out} is one of the files that are read; give another")
    if out.exists() and not config.overwrite:
        raise DataError(f"data: {out} is there already; --overwrite replaces it")
    report = Report(config.file)
    lines = (as_json(row).encode() + b"\n" for row in converted(config, report))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, _gzipped(lines) if out.suffix == ".gz" else lines)
    yield "\n".join([f"{config.file}: rows for {out}: {report.num_used}", *report.reasons()])


def converted(config: DataConvertConfig, report: Report) -> Iterator[Row]:
    """Yields our rows of a file, and counts in the report what becomes of its own.

    Raises: DataError as `convert` does."""
    importer = IMPORTERS[config.format]
    for number, row in importer.gather(_rows(config, importer, report)):
        try:
            for made in importer.convert(row, config):
                report.num_rows += 1
                try:
                    yield _checked(made)
                except Rejected as rejected:
                    report.reject(number, rejected.reason, rejected.detail)
        except Rejected as rejected:
            report.num_rows += 1
            report.reject(number, rejected.reason, rejected.detail)
    _check(report, config.max_rejected)


def _rows(config: DataConvertConfig, importer: Format, report: Report) -> Iterator[tuple[int, Row]]:
    """The rows of the file that have the columns of one layout of the format, that of the first row."""
    wanted = None
    for number, row in read_rows(config.file):
        if wanted is None:
            wanted = next((columns for columns in importer.columns if row.keys() >= set(columns)), None)
        if wanted is None:
            layouts = "; or ".join(", ".join(columns) for columns in importer.columns)
            found = ", ".join(row) or "(none)"
            raise DataError(f"data: {config.file} has the columns {found}; {config.format} has {layouts}")
        missing = [name for name in wanted if name not in row]
        if missing:
            report.num_rows += 1
            report.reject(number, Reason.MISSING_COLUMN, missing[0])
        else:
            yield number, row


def _checked(made: Row | Rejected) -> Row:
    """A row that the loaders take, whatever the tokenizer."""
    if isinstance(made, Rejected):
        raise made
    if "messages" in made:
        conversation(made["messages"])
    else:
        prompt_of(made["prompt"])
    texts = [made[name] for name in ("chosen", "rejected", "completion") if name in made]
    for text in (*texts, *made.get("responses", ())):
        text_of(text, Reason.EMPTY_RESPONSE)
    if "chosen" in made and made["chosen"] == made["rejected"]:
        raise Rejected(Reason.SAME)
    if "ranks" in made:
        check_ranks(made["responses"], made["ranks"])
    return made


def _check(report: Report, max_rejected: float) -> None:
    if report.num_rows == 0:
        raise DataError(f"data: {report.path} has no rows")
    if report.num_used == 0:
        raise DataError(f"data: nothing in {report.path} can be used\n" + "\n".join(report.reasons()))
    if report.num_faults > max_rejected * report.num_rows:
        counts = f"{report.num_faults} of {report.num_rows} rejected, more than max_rejected = {max_rejected:g} allows"
        advice = "raise it to go on without them"
        raise DataError(f"data: {counts}; {advice}\n" + "\n".join(report.reasons()))


def _gzipped(lines: Iterable[bytes]) -> Iterator[bytes]:
    squeeze = zlib.compressobj(wbits=31)
    for line in lines:
        yield squeeze.compress(line)
    yield squeeze.flush()
