"""Values of settings: converted to the types of their fields, and written as YAML."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from fastrlhf.errors import UserError, UserTypeError
from fastrlhf.settings.objects import GivenObject

HOME = re.compile(r"(?<![^,|(=\s])~[\w.-]*(?=[/,|)=#;]|$)")  # where a path begins, in a reward of several too


def expand(name: str, value: Any) -> Any:
    """Returns a path, or what is made of several, with the home folder in place of ~; a Path as text.

    Raises: ValueError for a path that is empty, which would be the current folder."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{name} is empty; give a path (an unset variable of a shell is empty), or leave it out")
    if not isinstance(value, str) or "~" not in value:
        return value
    return HOME.sub(lambda found: os.path.expanduser(found[0]), value)


def convert(name: str, value: Any, kind: Any) -> Any:
    """Returns the value of an option as its type: text from a command line, YAML's or Python's values alike.

    Raises: TypeError naming the option; ValueError for a number that is not finite."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options and value in (None, "none"):
        return None
    if callable(value) and any(typing.get_origin(k) is Callable for k in options):
        return value
    kind = next(k for k in options if k is not type(None))
    if typing.get_origin(kind) is tuple:
        return _texts(name, value)
    if typing.get_origin(kind) is Mapping:
        return _mapping(name, value)
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    # YAML reads 3e-6 as text, and a text is a number's text or a name; every other change of type would hide an error
    accepted = {bool: (), int: (int, str), float: (int, float, str), str: (int, float, str)}[kind]
    try:
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise ValueError
        value = kind(value)
    except ValueError:
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        raise UserTypeError(f"{name} must be {wanted}, got {value!r}") from None
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name} must be finite, got {value}")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """One text, or several: a list of YAML's or Python's, or its YAML form [a, b] on a command line."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserTypeError(f"{name}: {value!r} is no list; write ['first', 'second']") from None
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text for text in texts):
        raise UserTypeError(f"{name} must be text or a list of texts, none empty, got {value!r}")
    return tuple(texts)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    """Names with values: a mapping of YAML's or Python's, or its YAML or JSON form {a: 1} on a command line."""
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserTypeError(f"{name}: {value!r} is no mapping; write '{{name: value}}'") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) and key for key in value):
        raise UserTypeError(f"{name} must be a mapping of names to values, such as {{name: value}}, got {value!r}")
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise UserTypeError(
            f"{name} must hold texts, numbers, true, false, lists and mappings, got {value!r}"
        ) from None
    return value


def field_types(config_class: type) -> dict[str, Any]:
    """The type of each field, in order."""
    kinds = typing.get_type_hints(config_class)
    return {field.name: kinds[field.name] for field in dataclasses.fields(config_class)}


def options_where(config: Any, **rules: Any) -> set[str]:
    """The names of the options of a settings class, or of an object of one, that have these rules: path="input"."""
    fields = dataclasses.fields(config)
    return {field.name for field in fields if all(field.metadata[name] == value for name, value in rules.items())}


def dump(config: Any) -> str:
    """The configuration as YAML; a function is written as module:function, another object by what it is."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in values.items():
        if isinstance(value, GivenObject):
            values[name] = str(value)
        elif callable(value):
            values[name] = f"{value.__module__}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
