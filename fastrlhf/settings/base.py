"""What the settings of all commands have in common: how they are filled in, converted and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from fastrlhf.errors import UserError
from fastrlhf.settings.objects import GivenObject, descriptions, given
from fastrlhf.settings.option import check
from fastrlhf.settings.shipped import path_of
from fastrlhf.settings.values import convert, expand, field_types


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A frozen dataclass whose fields are the command's options: keys of its YAML file, and --options.

    Whatever a value comes from, it is converted to the field's type and checked when the object is made.

    shipped: of an option the file of the package that the value `shipped` stands for

    Raises: TypeError or ValueError naming the option."""

    shipped: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        self.fill_in()
        if described := descriptions(vars(self)):
            raise UserError(
                f"{', '.join(described)}: objects that a Python program gave, which a file or a command line cannot "
                "give; go on in Python, with the same objects and resume=True"
            )
        kinds = field_types(type(self))
        for field in fields(self):
            value, rules = getattr(self, field.name), field.metadata
            value = given(field.name, value, rules["object"]) if rules["object"] else value
            if not isinstance(value, GivenObject):
                if rules["path"]:
                    value = expand(field.name, value)
                    # a default keeps its name: that of `run`, which hands it on, is in the settings of older runs
                    value = value if value == field.default else path_of(field.name, value, self.shipped)
                value = convert(field.name, value, kinds[field.name])
            object.__setattr__(self, field.name, value)
            check(field, value)
        for message in self.conflicts():
            raise UserError(message)
        defaults = {field.name: field.default for field in fields(self)}
        for names, why in self.unused():
            for name in names.split():
                if getattr(self, name) != defaults[name]:
                    raise UserError(f"{name}{why}")

    def fill_in(self) -> None:
        """Sets what is None and follows from a preset or from another option, before values are converted."""

    def conflicts(self) -> Iterator[str]:
        """What is wrong with a combination of options that are right each alone: a message for each fault."""
        if getattr(self, "resume", False) and getattr(self, "overwrite", False):
            yield "resume and overwrite exclude each other"
        if getattr(self, "template", None) == "none" and getattr(self, "template_kwargs", None):
            yield "template_kwargs are the chat template's, but template is none: leave them out"

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options that do nothing beside the others, and why: an error for one that has not its default."""
        yield from ()
