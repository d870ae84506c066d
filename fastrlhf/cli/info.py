"""`fastrlhf info`: versions, devices, and what serves each op where; with a model, which of its layers are fast."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from fastrlhf import _cpu, ops
from fastrlhf.models.fast_paths import fast_paths, load_packed_model
from fastrlhf.models.shared_prompts import can_share_prompts
from fastrlhf.ops._registry import BACKEND, BACKENDS
from fastrlhf.runtime.checkpoint import environment
from fastrlhf.settings.info import InfoConfig

PACKAGES = ("torch", "transformers", "triton", "safetensors", "numpy", "pyarrow", "tensorboard", "matplotlib")


def info(config: InfoConfig) -> Iterator[str]:
    """Yields what the command prints."""
    if config.model is None:
        yield about_machine()
    else:
        yield from about_model(config.model, config)


def about_model(path: str, config: InfoConfig) -> Iterator[str]:
    """Yields a line for each fast path: how many of the layers that might go by it do, which, and which do not.

    Raises: as the loading of the model."""
    device, autocast = config.job().resolve_device(), config.job().autocast_dtype()
    role = load_packed_model(path, autocast=autocast, device=device)
    dtype = str(autocast or torch.float32).removeprefix("torch.")
    yield f"{type(role.model).__name__} of transformers {version('transformers')}, on {device} in {dtype}\n"
    for path_ in fast_paths(role):
        yield f"{path_.name:<16} {len(path_.taken)} of {len(path_.taken | path_.left)}: {names(path_.taken) or 'none'}"
        if path_.left:
            yield f"{'':<16} left to transformers: {names(path_.left)}"
    yield f"{'shared prompts':<16} {'yes' if can_share_prompts(role, device) else 'no'}"


def names(layers: dict[str, str]) -> str:
    """The layers, name -> class, by their classes; names that differ in a number alone stand as one."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for name, kind in layers.items():
        number = re.search(r"(?<=\.)\d+(?=\.|$)", name)
        pattern = f"{name[: number.start()]}{{}}{name[number.end() :]}" if number else name
        numbers.setdefault((kind, pattern), []).extend([number[0]] if number else [])
    kinds: dict[str, list[str]] = {}
    for (kind, pattern), found in numbers.items():
        kinds.setdefault(kind, []).append(pattern.replace("{}", _ranges([int(number) for number in found])))
    return "; ".join(f"{kind} {', '.join(patterns)}" for kind, patterns in kinds.items())


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def about_machine() -> str:
    """What this machine has."""
    here = environment()
    facts = {
        "fastrlhf": version("fastrlhf") if _installed("fastrlhf") else "not installed (run from its sources)",
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{name: version(name) if _installed(name) else "not installed" for name in PACKAGES},
        "torch": torch.__version__,  # with its build, +cpu or +cu130, which its metadata may leave out
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
