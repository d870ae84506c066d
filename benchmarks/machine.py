"""What figures depend on: processor or GPU, versions, commit, and the machine's limits, measured."""

import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastrlhf
from fastrlhf import _cpu

ROOT = Path(__file__).parents[1]
CODE = ("--", "*.py", "csrc", "setup.py")  # what must be committed for a result to be that of its commit


def synchronize(device: str) -> None:
    """Waits for what was started on the device."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on, and the measured limits of the device."""
    on_gpu = device != "cpu"
    return {
        "processor": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "isa": "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if on_gpu else _cpu.isa,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "fastrlhf": fastrlhf.__version__,
        "commit": _commit(),
        "copy_gb_s": round(copy_bandwidth(device), 1),
        "matrix_gflop_s": round(matrix_rate(device, torch.float32), 1),
        "matrix_bf16_gflop_s": round(matrix_rate(device, torch.bfloat16), 1),
    }


def copy_bandwidth(device: str) -> float:
    """GB/s of a copy into memory already touched, of 256 MiB or on a GPU 2 GiB; read and written bytes together."""
    source = torch.ones(2**26 if device == "cpu" else 2**29, device=device)
    target = source.clone()
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device) / 1e9


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """GFLOP/s of a product of two square matrices, of 2048 rows or on a GPU 8192."""
    a = torch.ones(2 * (2048 if device == "cpu" else 8192,), dtype=dtype, device=device)
    return 2 * len(a) ** 3 / _best(lambda: a @ a, device) / 1e9


def _best(function: Callable[[], Any], device: str) -> float:
    """The shortest of seven times in seconds."""
    times = []
    for _ in range(7):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _git(*args: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False).stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit measured; with a + where the code was changed since."""
    changed = _git("status", "--porcelain", "-uno", *CODE)
    return _git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
