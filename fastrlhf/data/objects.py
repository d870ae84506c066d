"""Copies of what Python gives in place of a path (`GivenObject`), as they would be read from files."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastrlhf.data.json_rows import DECODER
from fastrlhf.errors import DataError
from fastrlhf.settings.objects import GivenObject, ModelSource, RowsSource, given

__all__ = ["GivenObject", "ModelSource", "RowsSource", "copy_of", "given", "rows_of"]


def copy_of(auto: Any, source: GivenObject, **options: Any) -> Any:
    """Returns what auto.from_pretrained would of a folder that the object was saved to; options: of that. Until they
    are cloned, the weights are the object's own where dtype and device are the same."""
    if auto.__name__ == "AutoTokenizer":
        return _copied_tokenizer(source.value)
    model = source.value
    config = type(model.config).from_dict(model.config.to_dict())  # without what it was run with, such as attention
    config.architectures = [type(model).__name__]
    if auto.__name__ == "AutoConfig":
        return config
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # without memory, but it draws its weights
        kind = type(auto.from_config(config))
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    made = kind.from_pretrained(None, config=config, state_dict=state, **options)
    copied = made[0] if isinstance(made, tuple) else made
    copied.name_or_path = copied.config.name_or_path = model.name_or_path
    if getattr(model, "generation_config", None) is not None:  # it knows ends of a response
        copied.generation_config = copy.deepcopy(model.generation_config)
    return made


def rows_of(source: GivenObject) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, row), from 1: a copy of each row, as JSON would hold it; times are text, arrays lists.

    Raises: DataError for a row that is no mapping, or holds what JSON cannot."""
    for number, row in enumerate(source.value, 1):
        if not isinstance(row, Mapping):
            found = type(row).__name__
            raise DataError(f"data: {source}, row {number}: expected a mapping of columns, such as a dict, got {found}")
        try:
            yield number, DECODER.decode(json.dumps({**row}, default=_plain))
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"data: {source}, row {number}: no file could hold it ({error})") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {**value}
    for name in ("tolist", "isoformat"):  # arrays and their numbers; times and dates
        if hasattr(value, name):
            return getattr(value, name)()
    raise TypeError(f"a value of type {type(value).__name__}")


def _copied_tokenizer(tokenizer: Any) -> Any:
    """A copy, but for what `followed` keeps in it, which is made anew."""
    known = vars(tokenizer).get("_followed")
    return copy.deepcopy(tokenizer, {} if known is None else {id(known): {}})
