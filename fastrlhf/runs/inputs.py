"""Fingerprints of what a run reads besides its rows: models, files, the source of functions.

A resumed run compares them. Small files are read whole; of large ones a block at every tensor's start and blocks
evenly spread, so that gigabytes take a fraction of a second. A change elsewhere in a large tensor is not seen.
"""

from __future__ import annotations

import dataclasses
import glob
import inspect
import json
import os
import re
import struct
import sys
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub

Files = dict[str, str]  # what each file holds, by its name
SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".jsonl", ".gz", ".parquet", ".yaml", ".yml")
WHOLE = 8 * 2**20  # bytes of a file that is read whole
BLOCK, BLOCKS = 4096, 4096  # of a larger file: bytes of a block, and at most how many
SETTINGS = ("ppo", "reward")  # of a loop that is part of a job, in a YAML file: the loop compares them itself
FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):\w+(?:\.\w+)*")


def inputs_of(config: Any, *, leave_out: Collection[str]) -> dict[str, dict[str, Files]]:
    """What the settings name that is there: by setting, by its text, the files with their fingerprints."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in leave_out or (field.name in SETTINGS and str(value).endswith((".yaml", ".yml"))):
            continue
        found[field.name] = {piece: files for piece in pieces_of(value) if (files := files_of(piece))}
    return {name: pieces for name, pieces in found.items() if pieces}


def pieces_of(value: Any) -> Iterator[str]:
    """The paths, hub ids and functions in the value of a setting: it all, or parts of a reward such as a=1,b#head=2."""
    if callable(value):
        yield f"{value.__module__}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    for text in value if isinstance(value, tuple) else (value,):
        if not isinstance(text, str):
            continue
        if os.path.exists(text) or glob.has_magic(text):
            yield text
            continue
        for part in re.split(r"[,;()]", text):
            for piece in (part, re.sub(r"=[^=]*$", "", part), re.sub(r"(#[^#]*)?(=[^=]*)?$", "", part)):
                if piece.strip():
                    yield piece.strip()


def files_of(piece: str) -> Files:
    """The fingerprint of each file of a folder, a file, a glob, a cached model of the hub or a module; empty: none."""
    path = Path(piece)
    if path.is_file():
        return {path.name: fingerprint_of(path)}
    if glob.has_magic(piece) and not path.exists():
        return {
            Path(name).name: fingerprint_of(Path(name)) for name in sorted(glob.glob(piece)) if os.path.isfile(name)
        }
    if FUNCTION.fullmatch(piece):
        source = _source_of(piece.partition(":")[0])
        return {piece: fingerprint_of(source)} if source else {}
    if not path.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", piece):
        cached = huggingface_hub.try_to_load_from_cache(piece, "config.json")
        path = Path(cached).parent if isinstance(cached, str) else path
    if not path.is_dir():
        return {}
    inside = [*path.iterdir(), *(path / "adapter").glob("*")]
    named = {file.relative_to(path).as_posix(): file for file in inside if file.suffix in SUFFIXES and file.is_file()}
    return {name: fingerprint_of(file) for name, file in sorted(named.items())}


def fingerprint_of(path: Path) -> str:
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
            for file in {**before, **after}:
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
