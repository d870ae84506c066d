"""What is installed of others, to be measured beside ours; a line says what is not."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

import torch

GPU_ONLY = ("liger_kernel", "cut_cross_entropy")
_found = set[str]()


@functools.cache
def find(module: str, device: str = "cpu") -> ModuleType | None:
    """A module of a peer; None, and a line, where it is not installed or its kernels cannot run."""
    peer = module.partition(".")[0]
    if peer in GPU_ONLY and device != "cuda":
        print(f"{peer} runs on a GPU only, so it is left out: --device cuda", file=sys.stderr)
    elif importlib.util.find_spec(peer) is None:
        print(f"{peer} is not installed, so it is left out: pip install {peer.replace('_', '-')}", file=sys.stderr)
    else:
        _found.add(peer)
        return importlib.import_module(module)
    return None


def versions() -> str:
    """Those that were found, each with its version."""
    return ", ".join(f"{peer} {_version(peer)}" for peer in sorted(_found))


def _version(peer: str) -> str:
    try:
        return metadata.version(peer)
    except metadata.PackageNotFoundError:  # a checkout
        return getattr(sys.modules[peer], "__version__", "of unknown version")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a function, for each shape anew; its compiler is imported when it is first called."""
    made = functools.cache(lambda: torch.compile(function, dynamic=False))
    return lambda *args: made()(*args)
