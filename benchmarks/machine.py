"""What figures depend on: processor or GPU, versions, commit, and the machine's limits, measured."""

import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastrlhf
from benchmarks.case import Prepared, once
from fastrlhf import _cpu

ROOT = Path(__file__).parents[1]
CODE = ("--", "*.py", "csrc", "setup.py")  # what must be committed for a result to be that of its commit


def machine(device: str, tiny: bool = False) -> dict[str, Any]:
    """What the numbers depend on, and the measured limits of the device; with `tiny` of no significance, at once."""
    on_gpu = device != "cpu"
    elements, side = (2**20, 128) if tiny else (2**29, 8192) if on_gpu else (2**26, 2048)
    return {
        "processor": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "isa": "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if on_gpu else _cpu.isa,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "fastrlhf": fastrlhf.__version__,
        "commit": _commit(),
        "copy_gb_s": round(copy_bandwidth(device, elements), 1),
        "matrix_gflop_s": round(matrix_rate(device, torch.float32, side), 1),
        "matrix_bf16_gflop_s": round(matrix_rate(device, torch.bfloat16, side), 1),
    }


def copy_bandwidth(device: str, elements: int) -> float:
    """GB/s of a copy of float32 into memory already touched; read and written bytes together."""
    source = torch.ones(elements, device=device)
    target = source.clone()
    return 2 * source.nbytes / _best(lambda: target.copy_(source)) / 1e9


def matrix_rate(device: str, dtype: torch.dtype, side: int) -> float:
    """GFLOP/s of a product of two square matrices of random numbers: a GPU multiplies equal ones faster."""
    a = torch.randn(side, side, dtype=dtype, device=device)
    return 2 * side**3 / _best(lambda: a @ a) / 1e9


def _best(function: Callable[[], Any]) -> float:
    """The shortest of seven times in seconds."""
    return min(once(Prepared(tuple, function)) for _ in range(7)) / 1e3


def _git(*args: str) -> str:
    """What git says, or nothing: on a machine that has a copy of the tree without its history."""
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit measured, with a + where the code was changed since; without git, what FASTRLHF_COMMIT says."""
    if not _git("rev-parse", "HEAD"):
        return os.environ.get("FASTRLHF_COMMIT", "unknown")
    changed = _git("status", "--porcelain", "-uno", *CODE)
    return _git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
