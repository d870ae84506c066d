"""Reads a configuration from the command line and a YAML file. The command line wins over the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml

from fastrlhf.settings.option import REQUIRED
from fastrlhf.settings.other_names import hint
from fastrlhf.settings.ppo import PRESETS, PPOConfig
from fastrlhf.settings.run import RUN_PRESETS, RunConfig
from fastrlhf.settings.training import TrainerConfig
from fastrlhf.settings.values import expand, field_types, options_where
from fastrlhf.settings.yaml_file import UsageError, read_yaml

T = TypeVar("T")
KINDS: dict[Any, str] = {int: "INT", float: "NUM", str: "TEXT", Mapping[str, Any]: "YAML"}


def parse(config_class: type[T], arguments: Sequence[str]) -> T:
    """Returns the configuration of `--config FILE.yaml --key value --key=value --flag --no-flag VALUE ...`.

    Dashes and underscores are the same. A VALUE without a key is that of the next positional field.
    Raises: UsageError for an option that is not known (naming the nearest), that is missing or given twice, and for a
    YAML file that is not one; ValueError or TypeError for a value that the configuration refuses."""
    given = read_arguments(config_class, arguments)
    if "config" in given:
        given = {**read_yaml(config_class, given.pop("config")), **given}
    given = {**_planned(config_class, given), **given}
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    missing = [_shown(field) for field in fields if field.default is REQUIRED and field.name not in given]
    if missing:
        raise UsageError(f"missing {', '.join(missing)}")
    return config_class(**given)


def _planned(config_class: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that is resumed had planned (resume="plan"), which stays unless another is given."""
    output, resume = given.get("output"), str(given.get("resume", "false")).lower() == "true"
    if not (output and resume):
        return {}
    settings = Path(str(expand("output", output))) / "config.yaml"
    if not settings.is_file():
        return {}
    try:
        saved = yaml.safe_load(settings.read_text(encoding="utf-8"))
        return {name: saved[name] for name in options_where(config_class, resume="plan") if name in saved}
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):  # damaged: the run itself says more of it
        return {}


def read_arguments(config_class: type, arguments: Sequence[str]) -> dict[str, str]:
    """The options on a command line, by field name, as text."""
    kinds = {"config": str, **field_types(config_class)}
    given: dict[str, str] = {}
    places = [field.name for field in positional(config_class)]
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            if not places:
                key, equals, _ = argument.partition("=")  # as verl's are given
                hinted = hint(key, kinds, dashes=True) if equals else ""
                raise UsageError(f"expected an option --key, got {argument!r}{hinted}")
            argument = f"{_dashed(places.pop(0))}={argument}"
        key, equals, value = argument[2:].partition("=")
        name = key.replace("-", "_")
        if name.startswith("no_") and kinds.get(name[3:]) is bool and not equals:
            name, value = name[3:], "false"
        elif name not in kinds:
            raise UsageError(f"unknown option --{key}{hint(key, kinds, dashes=True)}")
        elif kinds[name] is bool and not equals:
            value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"option --{key} needs a value")
            value = rest.pop(0)
        if name in given:
            raise UsageError(f"option {_dashed(name)} is given twice")
        given[name] = value
    return given


def positional(config_class: type) -> list[dataclasses.Field[Any]]:
    """The fields whose values may stand on a command line without --key, in order."""
    return [field for field in dataclasses.fields(config_class) if field.metadata["positional"]]


def help_text(command: str, config_class: type, *, everything: bool = False) -> str:
    """Returns the help, one line per option: required ones, the command's own, then those shared by all trainers.

    everything: also the rare ones, which may be more than a screen"""
    usage = " ".join([command, *map(_shown, positional(config_class)), "[--config FILE.yaml] [--option VALUE ...]"])
    lines = [f"{usage}: {config_class.__doc__}"]
    shared = set(field_types(TrainerConfig))
    presets = {PPOConfig: PRESETS, RunConfig: RUN_PRESETS}.get(config_class, {})
    fields = [field for field in dataclasses.fields(config_class) if everything or not field.metadata["rare"]]
    for field in sorted(fields, key=lambda f: 0 if f.default is REQUIRED else 1 + (f.name in shared)):
        kind, name, default = field_types(config_class)[field.name], _shown(field), field.default
        if default is None and field.name in next(iter(presets.values()), {}):
            default = " | ".join(str(preset[field.name]) for preset in presets.values())
        if field.metadata["positional"]:
            option = name
        elif kind is bool:
            option, default = (f"--[no-]{name[2:]}" if default else name), None
        else:
            option = f"{name} {KINDS[next(k for k in (*get_args(kind), kind) if k in KINDS)]}"
        shown = "" if default is None else f" [{'required' if default is REQUIRED else default}]"
        lines.append(f"  {option:<25} {field.metadata['help']}{shown}")
    if left_out := len(dataclasses.fields(config_class)) - len(fields):
        lines.append(f"  {'--help-all':<25} {left_out} more options")
    return "\n".join(lines)


def _shown(field: dataclasses.Field[Any]) -> str:
    return field.name.upper() if field.metadata["positional"] else _dashed(field.name)


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")
