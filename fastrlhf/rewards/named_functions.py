"""Loads functions by name and reads their signatures. It imports no models, so that a reward server starts fast."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fastrlhf.errors import UserError, UserTypeError

MOVED = {"fastrlhf.demo.gold": "fastrlhf.rewards.gold"}  # modules of ours that settings may still name


def load_function(source: str, option: str = "reward") -> Callable[..., Any]:
    """Returns the function named by "module:function"; the working folder is on the path, as for python -m.

    option: that gave it, for errors"""
    module_name, _, name = source.partition(":")
    if not module_name or module_name.startswith("."):
        raise UserError(f"{option}: {source!r} names no module; write module:function")
    check_spelling(source, option)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and an import inside it failed
        if module_name in MOVED:
            raise UserError(
                f"{option}: {module_name} is now {MOVED[module_name]}: write {MOVED[module_name]}:{name}"
            ) from None
        turned = f"; write {name}:{module_name}" if name.isidentifier() and Path(f"{name}.py").is_file() else ""
        raise UserError(f"{option}: no module named {module_name!r} (working folder {Path.cwd()}){turned}") from None
    if not hasattr(module, name):
        raise UserError(f"{option}: module {module_name!r} has no function {name!r}{_others(module, name)}")
    function: Callable[..., Any] = getattr(module, name)
    if not callable(function):
        raise UserTypeError(f"{option}: {source} must be a function, got {type(function).__name__}")
    return function


def check_spelling(source: str, option: str) -> None:
    """Raises ValueError, with the right spelling, for a file in the place of a module, and for a URL without http."""
    module, _, name = source.partition(":")
    if "://" in source:
        raise UserError(f"{option}: {source!r} is no server; one is given as http://... or https://...")
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", source):
        raise UserError(f"{option}: {source!r} is no module:function; a server is given as http://{source}")
    if not module.endswith(".py"):
        return
    path = Path(module).with_suffix("")
    inside = not path.is_absolute() and all(part.isidentifier() for part in path.parts)
    written = f"{'.'.join(path.parts) if inside else path.name}:{name or 'FUNCTION'}"
    where = "" if inside else f", with {path.parent} as the working folder or in PYTHONPATH"
    raise UserError(f"{option}: {source!r} names a file; a function is given by its module: write {written}{where}")


def name_of(function: Callable[..., Any]) -> str:
    """What a function is called in messages."""
    name: str = getattr(function, "__qualname__", None) or repr(function)
    return name


def keywords_of(function: Callable[..., Any], available: Collection[str]) -> list[str]:
    """Returns which of the available keywords the function takes: all of them if it has **columns.

    Raises: TypeError when it cannot be called with two positional arguments and these."""
    name = name_of(function)
    # prompts and responses come first, without their names
    available = [keyword for keyword in dict.fromkeys(available) if keyword not in ("prompts", "responses")]
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a builtin
        return available
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    every = inspect.Parameter.VAR_KEYWORD in kinds
    taken = [keyword for keyword in available if every or keyword in signature.parameters]
    try:
        signature.bind(None, None, **dict.fromkeys(taken))
    except TypeError as error:
        expected = "(prompts, responses, *, response_ids, finished, **columns)"
        got = ", ".join(sorted(available))
        raise UserTypeError(f"reward: {name}{signature} must take {expected}, here with {got}: {error}") from None
    return taken


def _others(module: Any, name: str) -> str:
    """Returns a hint: the function of a module whose name is nearest, or else the functions that it defines."""
    own = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
    own = [other for other in own if getattr(vars(module)[other], "__module__", None) == module.__name__]
    near = difflib.get_close_matches(name, own, 1)
    if near:
        return f"; did you mean {module.__name__}:{near[0]}?"
    return f"; it has {', '.join(own[:8])}" if own else ""
