"""Rows of ours from the rows of other formats, a module a format; each says where its format is documented.

A format is what `columns` names, looked for in the first row, and `convert(row, config)`: it yields our rows, and a
Rejected in place of one that cannot be used. It may raise Rejected where nothing can be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastrlhf.data.importers import gsm8k, helpsteer, oasst, pku_saferlhf, sharegpt, tldr, ultrafeedback, webgpt
from fastrlhf.data.report import Rejected
from fastrlhf.settings.data import DataConvertConfig

Row = dict[str, Any]
Convert = Callable[[Mapping[str, Any], DataConvertConfig], Iterator[Row | Rejected]]


@dataclass(frozen=True)
class Format:
    """columns: those that every row has, of one layout or of several; convert: our rows from one of its rows;
    gather: its rows from those of the file, where they are not the same"""

    columns: tuple[tuple[str, ...], ...]
    convert: Convert
    gather: Callable[[Iterator[tuple[int, Row]]], Iterator[tuple[int, Row]]] = lambda rows: rows


IMPORTERS = {
    "gsm8k": Format(gsm8k.COLUMNS, gsm8k.convert),
    "helpsteer": Format(helpsteer.COLUMNS, helpsteer.convert),
    "oasst": Format(oasst.COLUMNS, oasst.convert, oasst.trees),
    "pku-saferlhf": Format(pku_saferlhf.COLUMNS, pku_saferlhf.convert),
    "sharegpt": Format(sharegpt.COLUMNS, sharegpt.convert),
    "tldr": Format(tldr.COLUMNS, tldr.convert),
    "ultrafeedback": Format(ultrafeedback.COLUMNS, ultrafeedback.convert),
    "webgpt": Format(webgpt.COLUMNS, webgpt.convert),
}
