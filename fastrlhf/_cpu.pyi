"""The native module: a function for every kernel of csrc/cpu, and the instruction set chosen at import."""

from typing import Any

isa: str

def __getattr__(name: str) -> Any: ...
