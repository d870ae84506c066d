"""`pytest --device interpreter`: the Triton kernels, run by Triton's interpreter, take the place of the CPU's."""

import functools
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

KERNELS = sorted(path.stem for path in (Path(__file__).parents[1] / "kernels").glob("*.py"))
_library = torch.library.Library("fastrlhf", "IMPL")  # its registrations last as long as it does


def replace_cpu_kernels() -> None:
    """From here on, CPU tensors go to the launchers registered for CUDA, where these are those of kernels/."""
    if "triton" in sys.modules:
        raise RuntimeError("Triton reads TRITON_INTERPRET when it is imported, which has happened")
    os.environ["TRITON_INTERPRET"] = "1"
    np.seterr(all="ignore")  # what overflows does so in silence, as on a GPU
    from fastrlhf.ops._registry import BACKENDS, SERVING

    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name, serves in BACKENDS.items():
        if name.rstrip("_").removesuffix("_backward") in KERNELS and serves["cuda"] == "native":
            launcher = functools.partial(getattr(torch.ops.fastrlhf, name).default.redispatch, keys)
            with warnings.catch_warnings(action="ignore"):  # the CPU's kernel is replaced on purpose
                _library.impl(name, launcher, "CPU", allow_override=True)
            SERVING[name]["cpu"] = launcher
