"""The native CUDA module, built where nvcc was found: a function for every kernel of csrc/cuda."""

from typing import Any

compiled_with: int

def num_devices() -> tuple[int, str]: ...
def __getattr__(name: str) -> Any: ...
