"""`fastrlhf info`: versions, devices, and what serves each op where."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fastrlhf import _cpu, ops
from fastrlhf.ops._registry import BACKEND, BACKENDS
from fastrlhf.runs.checkpoint import environment

PACKAGES = ("torch", "transformers", "triton", "safetensors", "numpy", "pyarrow", "tensorboard", "matplotlib")


def info() -> str:
    """The text of `fastrlhf info`."""
    here = environment()
    facts = {
        "fastrlhf": version("fastrlhf") if _installed("fastrlhf") else "not installed (run from its sources)",
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{name: version(name) if _installed(name) else "not installed" for name in PACKAGES},
        "processor": here["processor"],
        "instruction set": f"{_cpu.isa} (of base, avx2, avx512; FASTRLHF_ISA chooses); torch: {_torch_isa()}",
        "threads": torch.get_num_threads(),
        "gpu": _gpus(),
        "cuda extension": _cuda_extension(),
        "backend": f"{BACKEND} (FASTRLHF_BACKEND: native or ref)",
    }
    lines = [f"{name:<16} {value}" for name, value in facts.items()]
    lines += ["", f"{'op':<28} {'cpu':<10} cuda"]
    lines += [f"{name:<28} {serves['cpu']:<10} {serves['cuda']}" for name, serves in sorted(BACKENDS.items())]
    lines += ["", f"{len(ops.__all__)} functions: {', '.join(ops.__all__)}"]
    return "\n".join(lines)


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _cuda_extension() -> str:
    if importlib.util.find_spec("fastrlhf._cuda") is None:
        return "not built (no nvcc, or FASTRLHF_CUDA=0)"
    try:
        importlib.import_module("fastrlhf._cuda")
    except ImportError as error:
        return f"built, but it does not load: {error}"
    return "built"


def _torch_isa() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none" + ("" if torch.version.cuda else " (torch is a CPU build)")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"
