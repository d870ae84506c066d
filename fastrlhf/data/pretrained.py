"""What transformers reads from a folder or from the hub, with short errors of ours: which it was, what it lacks."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from fastrlhf.data import smollm2
from fastrlhf.data.objects import copy_of
from fastrlhf.errors import MissingFileError, UserError
from fastrlhf.settings.objects import GivenObject, ModelSource, given
from fastrlhf.settings.shipped import smollm2_folder

CONFIG = "config.json"
# what a folder holds that each of transformers' Auto classes reads: of each line one, by the start of the class's name
NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "AutoTokenizer": {"tokenizer": ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*")},
    "AutoConfig": {CONFIG: (CONFIG,)},
    "AutoModel": {CONFIG: (CONFIG,), "weights": ("*.safetensors", "*.bin")},
}


def read_pretrained(auto: Any, path: ModelSource, **options: Any) -> Any:
    """Returns auto.from_pretrained(path), of an Auto class of transformers; of an object a copy.

    Raises: FileNotFoundError for a folder that is not there or lacks files, or a hub id that cannot be fetched;
    ValueError for files that cannot be read. Both name the path."""
    what = "tokenizer" if auto.__name__ == "AutoTokenizer" else "model"
    source = given(what, path, what)
    if not isinstance(source, GivenObject) and Path(source) == smollm2_folder():
        smollm2.fetch()
    text, is_folder = os.fspath(source), os.path.isdir(source)
    if not is_folder and not isinstance(source, GivenObject):
        _check_hub_id(text)
    try:
        with without_progress_bars():
            if isinstance(source, GivenObject):
                return copy_of(auto, source, **options)
            return auto.from_pretrained(text, **options)
    except Exception as error:  # each file format has its own
        lacks = _lacks(auto, Path(text)) if is_folder else ""
        if lacks:
            raise MissingFileError(f"{what}: cannot load {text!r}: {lacks}") from error
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, OSError) and not is_folder:
            why = f"from the hub or its cache it cannot be loaded as {auto.__name__}: {reason}"
            raise MissingFileError(f"{_no_folder(text)}, and {why}") from error
        kind = MissingFileError if isinstance(error, OSError) else UserError
        raise kind(f"{what}: cannot load {text!r} as {auto.__name__} ({type(error).__name__}: {reason})") from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """No progress bars of transformers on weights that are read or written; those of downloads stay as they are."""
    before = logging.is_progress_bar_enabled()
    logging._tqdm_active = False  # logging.disable_progress_bar changes the hub's bars too
    try:
        yield
    finally:
        logging._tqdm_active = before


def _lacks(auto: Any, folder: Path) -> str:
    """What a folder lacks of what `auto` reads, and which folder in it does not."""
    needed = next(needed for start, needed in NEEDED.items() if auto.__name__.startswith(start))

    def missing(place: Path) -> list[str]:
        return [name for name, files in needed.items() if not any(any(place.glob(file)) for file in files)]

    found = missing(folder)
    if not found:
        return ""
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and not missing(path)]
    # a run leaves its model in OUTPUT/model, the best one in OUTPUT/best
    hint = f"; did you mean {max(inside, key=lambda path: path.name == 'model')}?" if inside else ""
    return f"the folder has no {' and no '.join(found)}{hint}"


def _no_folder(text: str) -> str:
    """What to say of a model that is no folder: what there is in its place, and which folder has nearly its name."""
    if os.path.exists(text):
        return f"model {text!r} not found: it is a file, expected a folder"
    parent, name = os.path.split(text.rstrip("/"))
    beside = (
        [path.name for path in Path(parent or ".").iterdir() if path.is_dir()] if os.path.isdir(parent or ".") else []
    )
    near = difflib.get_close_matches(name, beside, 1)
    hint = f" (did you mean {os.path.join(parent, near[0])}?)" if near else ""
    return f"model {text!r} not found: there is no such folder{hint}"


def _check_hub_id(text: str) -> None:
    """Raises FileNotFoundError for what can only be a folder, and is none, and for a hub id where there is no hub: it
    is asked once, while transformers asks six times, for half a minute."""
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise MissingFileError(f"{_no_folder(text)}, and it is no hub id OWNER/NAME either")
    cached = isinstance(huggingface_hub.try_to_load_from_cache(text, CONFIG), str)
    if cached or huggingface_hub.constants.HF_HUB_OFFLINE:  # transformers is quick with these
        return
    try:
        huggingface_hub.file_exists(text, CONFIG)
    except HfHubHTTPError:  # the hub was reached: transformers tells more of this error
        return
    except Exception as error:  # each version has other libraries to connect with
        raise MissingFileError(
            f"{_no_folder(text)}, and as a hub id it is neither in the cache nor can it be fetched from "
            f"{huggingface_hub.constants.ENDPOINT} ({type(error).__name__}: {error})"
        ) from error
