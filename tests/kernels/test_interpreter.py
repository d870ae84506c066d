"""The tests of the ops pass on their Triton kernels, which Triton's interpreter runs on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import KERNELS

from fastrlhf.ops._registry import BACKENDS, OPS

pytest.importorskip("triton", reason="Triton is not installed, so CUDA takes the references: pip install -e .[gpu]")

ROOT = Path(__file__).parents[2]
LEFT_OUT = {  # tests that run too many programs for it, or are not of the kernel
    "token_logprobs": ["gradcheck", "threads"],
}


@pytest.mark.slow
@pytest.mark.parametrize("op", KERNELS)
def test_the_op_passes_its_tests_on_its_triton_kernel(op):
    chosen = " and not ".join(
        [op, "bad_input", *(name for name in OPS if op in name and op != name), *LEFT_OUT.get(op, [])]
    )
    options = ["--device", "interpreter", "-k", chosen, "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, "tests/ops/test_contract.py", f"tests/ops/test_{op}.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("op", KERNELS)
def test_every_file_of_kernels_serves_the_op_of_its_name(op):
    assert op in OPS and BACKENDS[op]["cuda"] == "native"
