"""Docstrings for the site: kept as they are written, line by line; the help of an option is that of its field."""

import ast
from typing import Any

import griffe

OPTIONS = ("option", "rare", "reads")  # how a field of the settings is made: default, help


class Docstrings(griffe.Extension):
    """Puts each docstring into a block, since its lines (one a tensor) would otherwise run into one another."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = f"```text\n{obj.docstring.value}\n```"

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        call = option_call(str(attr.value or ""))
        if call is not None:
            default = ast.unparse(call.args[0])
            attr.value = None if default in ("None", "REQUIRED") else default
            attr.docstring = griffe.Docstring(help_of(call), parent=attr)


def option_call(value: str) -> ast.Call | None:
    """The definition of an option, parsed: its default and its help; None for what is no option."""
    if not value.startswith(tuple(f"{name}(" for name in OPTIONS)):
        return None
    call = ast.parse(value, mode="eval").body
    is_option = isinstance(call, ast.Call) and len(call.args) == 2 and isinstance(call.args[1], ast.Constant)
    return call if is_option else None


def help_of(call: ast.Call) -> str:
    """What an option does, with its choices where the text has a place for them."""
    choices = next((each.value for each in call.keywords if each.arg == "choices"), None)
    names = choices.value.replace(" ", ", ") if isinstance(choices, ast.Constant) else "see the command's --help"
    return str(ast.literal_eval(call.args[1])).replace("{}", names)
