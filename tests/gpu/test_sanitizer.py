"""compute-sanitizer over the kernels of csrc/cuda: no access outside a tensor, no race in shared memory."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cuda_kernels import SOURCES

from fastrlhf.ops._registry import OPS

ROOT = Path(__file__).parents[2]
BIN = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin"  # of the package nvidia-cuda-sanitizer-api


def run(found, tool, *command):
    """Python under a tool of compute-sanitizer; 9 is the status where it reports something."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # torch would keep many tensors in one allocation, inside which nothing counts as outside
    environment = {**os.environ, "PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    return subprocess.run(
        [found, *options, sys.executable, *map(str, command)], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def sanitizer(gpu):
    """run, with the compute-sanitizer that was found."""
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=BIN)
    if found is None:
        pytest.skip("no compute-sanitizer on PATH; pip install nvidia-cuda-sanitizer-api brings one")
    done = run(found, "memcheck", "-c", "import torch; torch.zeros(1).cuda()")
    if done.returncode != 0:
        pytest.skip(f"compute-sanitizer does not start here: {(done.stdout + done.stderr)[-500:]}")
    return lambda *args: run(found, *args)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_tool_has_nothing_to_report(tool, sanitizer):
    done = sanitizer(tool, Path(__file__).with_name("sanitized.py"))
    assert done.returncode == 0 and re.search("SUMMARY: 0 (errors|hazards)", done.stdout), done.stdout + done.stderr
    launched = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert set(launched) == {*SOURCES, "masked_moments"} and set(launched) <= set(OPS)


@pytest.mark.slow
def test_a_launch_outside_its_tensors_is_reported(sanitizer):
    done = sanitizer("memcheck", Path(__file__).with_name("sanitized.py"), "wild")
    assert done.returncode == 9 and "Invalid __global__ " in done.stdout, done.stdout + done.stderr
