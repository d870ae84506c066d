"""What transformers reads from a folder or from the hub, with short errors of ours: which it was, what it lacks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

CONFIG = "config.json"
# what a folder holds that each of transformers' Auto classes reads: of each line one, by the start of the class's name
NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "AutoTokenizer": {"tokenizer": ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*")},
    "AutoConfig": {CONFIG: (CONFIG,)},
    "AutoModel": {CONFIG: (CONFIG,), "weights": ("*.safetensors", "*.bin")},
}


def read_pretrained(auto: Any, path: str | Path, **options: Any) -> Any:
    """Returns auto.from_pretrained(path), of an Auto class of transformers.

    Raises: FileNotFoundError for a folder that is not there or lacks files, or a hub id that cannot be fetched;
    ValueError for files that cannot be read. Both name the path."""
    text = os.fspath(path)
    what = "tokenizer" if auto.__name__ == "AutoTokenizer" else "model"
    if not os.path.isdir(text):
        _check_hub_id(text, what)
    try:
        return auto.from_pretrained(text, **options)
    except Exception as error:  # each file format has its own
        lacks = _lacks(auto, Path(text)) if os.path.isdir(text) else ""
        if lacks:
            raise FileNotFoundError(f"{what}: cannot load {text!r}: {lacks}") from error
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        reason = str(error).strip().partition("\n")[0]
        raise kind(f"{what}: cannot load {text!r} as {auto.__name__} ({type(error).__name__}: {reason})") from error


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


def _check_hub_id(text: str, what: str) -> None:
    """Raises FileNotFoundError for what can only be a folder, and is none, and for a hub id where there is no hub: it
    is asked once, while transformers asks six times, for half a minute."""
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise FileNotFoundError(f"{what}: no folder {text!r}, and no hub id OWNER/NAME either")
    cached = isinstance(huggingface_hub.try_to_load_from_cache(text, CONFIG), str)
    if cached or huggingface_hub.constants.HF_HUB_OFFLINE:  # transformers is quick with these
        return
    try:
        huggingface_hub.file_exists(text, CONFIG)
    except HfHubHTTPError:  # the hub was reached: transformers tells more of this error
        return
    except Exception as error:  # each version has other libraries to connect with
        raise FileNotFoundError(
            f"{what}: no folder {text!r}, and as a hub id it is neither in the cache nor can it be fetched from "
            f"{huggingface_hub.constants.ENDPOINT} ({type(error).__name__}: {error})"
        ) from error
