"""Fingerprints of what a run reads besides its rows: models, files, the source of functions.

A resumed run compares them. Small files are read whole; of large ones a block at every tensor's start and blocks
evenly spread, so that gigabytes take a fraction of a second. A change elsewhere in a large tensor is not seen.
"""

from __future__ import annotations

import glob
import inspect
import json
import os
import re
import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

from fastrlhf.data.files import data_files
from fastrlhf.errors import DataError
from fastrlhf.runtime.object_fingerprints import fingerprint_of_object
from fastrlhf.settings.objects import GivenObject
from fastrlhf.settings.values import options_where

Files = dict[str, str]  # what each file holds, by its name
# of a model's folder: what changes what it computes
MODEL = (
    *("*.safetensors", "*.bin", "*config.json", "adapter/*.safetensors", "adapter/*.json"),
    *("*.jinja", "*.model", "vocab.*", "merges.txt", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
)
WHOLE = 8 * 2**20  # bytes of a file that is read whole
BLOCK, BLOCKS = 4096, 4096  # of a larger file: bytes of a block, and at most how many
FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):\w+(?:\.\w+)*")


def inputs_of(config: Any) -> dict[str, dict[str, Files]]:
    """Returns the fingerprints of the files that the settings name: setting -> path -> file."""
    found = {}
    for name in options_where(config, path="input"):
        pieces = {piece: files for piece in pieces_of(getattr(config, name)) if (files := files_of(piece))}
        if pieces:
            found[name] = pieces
    return dict(sorted(found.items()))


def pieces_of(value: Any) -> Iterator[str]:
    """The paths, hub ids and functions in the value of a setting: it all, or parts of a reward such as a=1,b#head=2."""
    if isinstance(value, GivenObject):
        yield value
        return
    if callable(value):
        yield f"{value.__module__}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    for text in value if isinstance(value, tuple) else (value,):
        if not isinstance(text, str):
            continue
        if os.path.exists(text) or glob.has_magic(text):
            yield text
            continue
        for part in re.split(r"[,;()|]", text):
            for piece in (part, re.sub(r"=[^=]*$", "", part), re.sub(r"(#[^#]*)?(=[^=]*)?$", "", part)):
                if piece.strip():
                    yield piece.strip()


def files_of(piece: str) -> Files:
    """The fingerprint of each file of a model, of data (see `data_files`), or of a module; empty if there is none."""
    if isinstance(piece, GivenObject):
        return fingerprint_of_object(piece)
    path = Path(piece)
    if FUNCTION.fullmatch(piece) and not path.exists():
        source = _source_of(piece.partition(":")[0])
        return {piece: fingerprint_file(source)} if source else {}
    if path.is_file():
        return {path.name: fingerprint_file(path)}
    if not path.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", piece):
        cached = huggingface_hub.try_to_load_from_cache(piece, "config.json")
        path = Path(cached).parent if isinstance(cached, str) else path
    found = {file for pattern in MODEL for file in path.glob(pattern)} if path.is_dir() else set()
    if not found:
        try:
            found = set(data_files(piece))
        except DataError:  # nothing that we read, or not there: loading says more of it
            return {}
    names = {os.path.relpath(file, path) if path.is_dir() else str(file): file for file in found if file.is_file()}
    return {name: fingerprint_file(file) for name, file in sorted(names.items())}


def base_of(folder: str) -> str | None:
    """The model that the adapter in a folder was trained on, by its settings."""
    for path in (Path(folder) / "adapter_config.json", Path(folder) / "adapter" / "adapter_config.json"):
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def fingerprint_file(path: Path) -> str:
    """The size of a file and a checksum of what is read of it."""
    size = path.stat().st_size
    checksum = 0
    with open(path, "rb") as file:
        if size <= WHOLE:
            checksum = zlib.crc32(file.read())
        else:
            spread = {n * (size - BLOCK) // 255 for n in range(256)}
            for start in sorted({*spread, *_tensor_starts(path, size)}):
                file.seek(start)
                checksum = zlib.crc32(file.read(BLOCK), checksum)
    return f"{size}:{checksum:08x}"


def changed(then: dict[str, dict[str, Files]], now: dict[str, dict[str, Files]]) -> Iterator[tuple[str, str, str]]:
    """(setting, path, file) of each input that is there and is no longer what it was; a path may have moved."""
    for name, pieces in then.items():
        for (_, before), (piece, after) in zip(pieces.items(), now.get(name, {}).items(), strict=False):
            # a model of the hub may be there in part when a run begins
            new = [] if not os.path.exists(piece) else [file for file in after if file not in before]
            for file in [*before, *new]:
                if before.get(file) != after.get(file):
                    yield name, piece, file


def is_function(piece: str) -> bool:
    """Whether an input is a function, of which the source of its module is compared."""
    return FUNCTION.fullmatch(piece) is not None and not os.path.exists(piece)


def _tensor_starts(path: Path, size: int) -> list[int]:
    """Where the tensors of a safetensors file start; not all if there are very many."""
    if path.suffix != ".safetensors":
        return []
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        starts = [8 + length + value["data_offsets"][0] for name, value in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, struct.error):  # damaged: loading says more of it
        return []
    return starts[:: 1 + len(starts) // BLOCKS]


def _source_of(module: str) -> Path | None:
    """The file of a module, which need not be imported yet."""
    if module in sys.modules:
        try:
            return Path(inspect.getfile(sys.modules[module]))
        except TypeError:  # built in
            return None
    relative = module.replace(".", "/")
    for folder in (".", *sys.path):
        for path in (Path(folder) / f"{relative}.py", Path(folder) / relative / "__init__.py"):
            if path.is_file():
                return path
    return None


def fingerprint_tokens(sequences: Iterable[Sequence[int]]) -> int:
    """A checksum of token sequences, by which a resumed run notices that its data changed."""
    checksum = 0
    for sequence in sequences:
        checksum = zlib.crc32(array("q", [len(sequence), *sequence]).tobytes(), checksum)
    return checksum
