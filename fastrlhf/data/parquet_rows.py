"""Rows of a Parquet file, as JSON would hold them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastrlhf.data.json_rows import LONGEST
from fastrlhf.errors import DataError

ROWS = 256  # at most so many are read at a time
BYTES = 2**29  # that they may unpack to: a small file may hold very long rows


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, row), from 1. Times and dates are text as in ISO 8601, decimal numbers are floats, and bytes are
    their text, or base64 where they are none.

    Raises: DataError for a file that is damaged, no Parquet, or of types that cannot be read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError(f"data: reading {path} needs pyarrow: pip install 'fastrlhf[parquet]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = pyarrow.schema([(field.name, _plain(field.type)) for field in file.schema_arrow])
            names = [field.name for field in schema if _has_bytes(field.type)]
            for batch in _batches(file):
                table = pyarrow.Table.from_batches([batch])
                table = table if table.schema.equals(schema) else table.cast(schema)
                step = 1 if table.nbytes > LONGEST else ROWS
                for start in range(0, len(table), step):
                    part = table.slice(start, step)
                    if step == 1 and part.nbytes > LONGEST:
                        size = f"more than {LONGEST // 2**20} MiB"
                        raise DataError(f"data: {path}, row {number + 1}: a row of {size}")
                    for row in part.to_pylist():
                        number += 1
                        yield number, {**row, **{name: _text(row[name]) for name in names}} if names else row
    except DataError:
        raise
    except pyarrow.ArrowNotImplementedError as error:
        raise DataError(f"data: {path}, after row {number}: of a type that cannot be read ({_line(error)})") from None
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"data: {path}, after row {number}: not a whole Parquet file ({_line(error)})") from None


def _batches(file: Any) -> Iterator[Any]:
    """Batches of few enough rows that they fit into BYTES, or of one row: none unpacks to more than its row group. (The
    mean length of rows is no bound: one may be long, and a text that many rows share is stored once.)"""
    for n in range(file.num_row_groups):
        longest = max(1, file.metadata.row_group(n).total_byte_size)
        yield from file.iter_batches(batch_size=min(ROWS, max(1, BYTES // longest)), row_groups=[n])


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _plain(kind: Any) -> Any:
    """The Arrow type in which JSON would hold a value of an Arrow type."""
    from pyarrow import field, float64, int64, large_list, list_, string, struct, types

    if types.is_timestamp(kind) or types.is_date(kind) or types.is_time(kind):
        return string()
    if types.is_decimal(kind):
        return float64()
    if types.is_duration(kind):
        return int64()
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_struct(kind):
        return struct([field(each.name, _plain(each.type)) for each in kind])
    if types.is_list(kind) or types.is_fixed_size_list(kind):
        return list_(_plain(kind.value_type))
    return large_list(_plain(kind.value_type)) if types.is_large_list(kind) else kind


def _has_bytes(kind: Any) -> bool:
    from pyarrow import types

    inner = [kind.field(n).type for n in range(kind.num_fields)]
    return any(map(_has_bytes, inner)) or any(
        is_kind(kind) for is_kind in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    )


def _text(value: Any) -> Any:
    """A value with text in place of its bytes."""
    if isinstance(value, dict):
        return {name: _text(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_text(each) for each in value]
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()
