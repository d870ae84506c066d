"""How an op reaches its Triton kernel, and the kernels of csrc/cuda, which take addresses and a stream."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

try:
    from fastrlhf import _cuda
except ImportError:  # not built, as there was no nvcc: the references serve CUDA
    _cuda = None  # type: ignore[assignment]


def if_built(launcher: Callable[..., Any]) -> Callable[..., Any] | None:
    """The launcher, or None where the extension that it needs is missing."""
    return None if _cuda is None else launcher


def triton(name: str) -> Any:
    """The module fastrlhf.kernels.<name>, or None without Triton: the reference serves CUDA."""
    try:
        return import_module(f"fastrlhf.kernels.{name}")
    except ImportError:
        return None


def launch(kernel: str, like: Tensor, *args: Any) -> None:
    """Starts a kernel on the device of the tensor `like`, on the stream that is current there."""
    with torch.cuda.device(like.device):
        getattr(_cuda, kernel)(*args, torch.cuda.current_stream().cuda_stream)
