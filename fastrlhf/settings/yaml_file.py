"""Settings in a YAML file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from fastrlhf.errors import UserError
from fastrlhf.settings.other_names import hint
from fastrlhf.settings.values import expand, field_types


class UsageError(UserError):
    """A command line or a YAML file that cannot be understood."""


def read_yaml(config_class: type, path: str) -> dict[str, Any]:
    """The settings in a YAML file, by field name."""
    path = expand("config", path)
    if not Path(path).is_file():
        raise UsageError(f"config: no file {path!r}")
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # not UTF-8, no such date, too long a number, too deep
        raise UsageError(f"config: {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"config: {path} must hold lines `key: value`, got {type(values).__name__}")
    known = list(field_types(config_class))
    for key in values:
        if str(key).replace("-", "_") not in known:
            raise UsageError(f"config: {path}: unknown key {key}{hint(str(key), known, dashes=False)}")
    # PyYAML keeps the last of several in silence
    names = [str(key.value).replace("-", "_") for key, _ in yaml.compose(text).value] if values else []
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"config: {path}: {name} is given twice")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def read_further(config_class: type, path: str | None, *, taken: Iterable[str]) -> dict[str, Any]:
    """The settings in a YAML file for a loop that is part of a larger job; none without a file.

    Raises: UsageError for one that the job gives itself (taken)."""
    settings = read_yaml(config_class, path) if path else {}
    for name in taken:
        if name in settings:
            raise UsageError(f"config: {path}: {name} follows from the command that reads it, leave it out")
    return settings
