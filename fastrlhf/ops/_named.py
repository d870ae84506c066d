"""Errors of Python, torch and the extension about an argument of the wrong kind, in our words.

The ops check what kinds of tensors and which numbers they get. That something is a tensor or a number at all they take
for granted, so that the usual call pays nothing for the question: it is asked where a call has failed."""

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
KINDS: dict[Any, tuple[Any, str]] = {  # annotation -> what passes for it, and its name
    Tensor: (Tensor, "a tensor"),
    float: (numbers.Real, "a number"),
    int: (numbers.Integral, "an integer"),
    bool: (numbers.Integral, "True or False"),
    str: (str, "text"),
    types.NoneType: (types.NoneType, "None"),
    tuple: ((tuple, list), "a tuple"),
}


def names_arguments(function: F) -> F:
    """The public function, with a TypeError that names the argument where it fails over one of the wrong kind."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            name = function.__name__
            wrong = None if str(error).startswith(f"{name}: ") else _wrong(function, args, kwargs)
            if wrong is None:
                raise
            raise TypeError(f"{name}: {wrong}") from error

    return typing.cast(F, call)


def _wrong(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What is wrong with the first argument of a wrong kind, if there is one."""
    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # a missing or unknown argument: Python's own words are good
        return None
    for name, value in given.items():
        annotation = signature.parameters[name].annotation
        union = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        kinds = [KINDS.get(typing.get_origin(a) or a) for a in union]
        if None in kinds:
            continue
        if not any(isinstance(value, kind[0]) for kind in kinds if kind):
            expected = " or ".join(kind[1] for kind in kinds if kind)
            return f"{name} must be {expected}, got {type(value).__name__}"
        if isinstance(value, Tensor) and value.layout != torch.strided:
            return f"{name} must be a dense tensor, got {value.layout}"
        if isinstance(value, Tensor) and value.is_floating_point() and value.itemsize == 1:
            return f"{name} must not be of 8 bits, got {value.dtype}"
    return None
