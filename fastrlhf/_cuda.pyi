"""The native CUDA module, built where nvcc was found."""

compiled_with: int

def num_devices() -> tuple[int, str]: ...
