"""Objects of Python as settings, in place of paths and names: models, tokenizers, rows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from torch import nn

from fastrlhf.errors import UserError, UserTypeError

ModelSource = str | Path | nn.Module  # a folder, a hub id or a model
RowsSource = str | Path | Iterable[Mapping[str, Any]]  # files or rows
DESCRIPTION = re.compile(r"<\w+( object| of \d+ rows)>")


class GivenObject(str):
    """An object in the place of a path, as the text that describes it: messages, config.yaml and all that passes paths
    on need not know of it. It equals what holds the same object, not what has the same text.

    value: the object, which stays as it is; whoever would load from the path makes a copy"""

    value: Any

    def __new__(cls, text: str, value: Any) -> GivenObject:
        given = super().__new__(cls, text)
        given.value = value
        return given

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GivenObject) and self.value is other.value

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return id(self.value)


def given(name: str, value: Any, kind: str) -> Any:
    """Returns the value of an option, an object as a GivenObject.

    kind: what the option takes besides text: model, tokenizer, rows, or reward (a model; functions stay as they are)

    Raises: TypeError for another object; ValueError for a model whose weights cannot be copied."""
    if value is None or isinstance(value, (str, int, float, os.PathLike)):  # a file of settings may have a folder 123
        return value
    if kind == "rows":
        return _rows(name, value)
    is_model = isinstance(value, nn.Module) and hasattr(value, "config" if not hasattr(value, "adapter") else "model")
    if kind == "reward" and callable(value) and not is_model:
        return value
    if not (hasattr(value, "convert_ids_to_tokens") if kind == "tokenizer" else is_model):
        expected = "text, a function or a model" if kind == "reward" else f"a folder, a hub id or a {kind}"
        raise UserTypeError(f"{name} must be {expected} of transformers, got {value!r:.80}")
    value = value if kind == "tokenizer" else _model(name, value)
    return GivenObject(f"<{_class(value)} object>", value)


def descriptions(values: Mapping[str, Any]) -> list[str]:
    """The names of the options whose value is a text that stands for an object, as in the config.yaml of a run that
    Python gave objects."""
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    return [name for name, text in texts.items() if not isinstance(text, GivenObject) and DESCRIPTION.fullmatch(text)]


def _rows(name: str, value: Any) -> GivenObject:
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        hint = "; give one of its splits" if isinstance(value, Mapping) else ""
        raise UserTypeError(f"{name} must be a path or rows, such as a list of dicts, got {_class(value)}{hint}")
    if isinstance(value, Sequence) and value and isinstance(value[0], str):
        raise UserTypeError(f"{name} must be one path or rows, got {value!r:.80}; several files are a folder or a glob")
    rows = value if isinstance(value, Sized) else list(value)
    return GivenObject(f"<{_class(value)} of {len(rows)} rows>", rows)


def _model(name: str, value: Any) -> Any:
    """A transformers model, that of a Policy or RewardModel of ours too. Raises: ValueError for one in parts."""
    if hasattr(value, "adapter") and hasattr(value, "autocast"):
        if value.adapter is not None:
            raise UserError(f"{name}: this {_class(value)} has an adapter: save it, and give the folder")
        value = value.model
    if getattr(value, "peft_config", None):
        raise UserError(f"{name}: this {_class(value)} has adapters of PEFT: give what merge_and_unload() returns")
    if getattr(value, "hf_quantizer", None) or getattr(value, "is_quantized", False):
        raise UserError(f"{name}: this {_class(value)} is quantized: load it in float32, bfloat16 or float16")
    if any(parameter.is_meta for parameter in value.parameters()):
        raise UserError(f"{name}: weights of this {_class(value)} are on no device (meta): load it without offloading")
    return value


def _class(value: Any) -> str:
    return type(value).__name__
