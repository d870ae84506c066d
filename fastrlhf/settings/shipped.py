"""Short names for what comes with the package: the model `smollm2`, and the rows `shipped`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SMOLLM2 = "smollm2"
SHIPPED = "shipped"
MODEL_OPTIONS = ("model", "reference", "tokenizer", "policy", "proxy")
FILES = Path(__file__).parents[1] / "commands" / "demo"


def smollm2_folder() -> Path:
    """The folder that SmolLM2-135M-Instruct is fetched into when a model is first loaded from it."""
    return Path.home() / ".cache" / "fastrlhf" / "SmolLM2-135M-Instruct"


def path_of(name: str, value: Any, shipped: Mapping[str, str]) -> Any:
    """Returns the path that the value of an option stands for; other values as they are. ./smollm2 is a folder.

    shipped: option -> the file of the package that `shipped` stands for there"""
    if value == SMOLLM2 and name in MODEL_OPTIONS:
        return str(smollm2_folder())
    return str(FILES / shipped[name]) if value == SHIPPED and name in shipped else value
