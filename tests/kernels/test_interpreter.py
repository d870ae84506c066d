"""The tests of the ops pass on their Triton kernels, which Triton's interpreter runs on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import KERNELS

from fastrlhf.ops._registry import BACKENDS, OPS
from fastrlhf.ops.sample_tokens import uniforms

pytest.importorskip("triton", reason="Triton is not installed, so CUDA takes the references: pip install -e .[gpu]")

ROOT = Path(__file__).parents[2]
LEFT_OUT = {  # tests that run too many programs for it, or are not of the kernel
    "decode_attention": ["bfloat16"],  # of which the interpreter multiplies matrices of bits
    "rms_norm": ["gradcheck", "threads", "1100"],
    "rotary": ["gradcheck"],
    "silu_mul": ["gradcheck", "300"],
    "sample_tokens": ["frequencies", "successive", "truncation", "draws_what", "opcheck", "repeats", "contiguous"],
    "kl_divergence": ["gradcheck", "threads"],
    "ppo_sequence_loss": ["gradcheck", "threads"],
    "token_logprobs": ["gradcheck", "threads"],
}


def interpreted(*command):
    """A Python process in which Triton interprets, when it has ended."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def printed():
    """What pytest says of all ops' tests, in one process: importing and collecting take longer than most of them."""
    chosen = []
    for op in KERNELS:
        others = [name for name in OPS if op in name and op != name]
        chosen.append(" and not ".join([op, "bad_input", *others, *LEFT_OUT.get(op, [])]))
    options = ["-v", "--device", "interpreter", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    options += ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]  # in Triton 3.6's interpreter
    options += ["-k", " or ".join(f"({tests})" for tests in chosen)]
    done = interpreted(
        "-m", "pytest", *options, "tests/ops/test_contract.py", *[f"tests/ops/test_{op}.py" for op in KERNELS]
    )
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first waits for all of them
@pytest.mark.parametrize("op", KERNELS)
def test_the_op_passes_its_tests_on_its_triton_kernel(op, printed):
    for tests in (rf"contract\.py::\w+\[{op}\b", rf"{op}\.py::"):
        outcomes = re.findall(rf"^tests/ops/test_{tests}.* ([A-Z]+) +\[", printed, re.MULTILINE)
        assert outcomes and set(outcomes) == {"PASSED"}, printed[-10000:]


def test_uniform_numbers_and_tokens_are_those_of_the_cpu(tmp_path):
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (2, 40))
    seeds[:5], positions[:5] = torch.tensor([[0, -1, 0, 2**63 - 1, -(2**63)], [0, 0, -1, 2**63 - 1, -(2**63)]])
    args = 2 * torch.randn(40, 300), seeds, positions, 0.8, 100, 0.95, 0.01
    torch.save(args, tmp_path / "args.pt")
    done = interpreted("tests/kernels/draws.py", str(tmp_path / "args.pt"))
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split()
    assert [float.fromhex(number) for number in printed[::2]] == uniforms(seeds, positions).tolist()
    tokens, *_ = OPS["sample_tokens"](*args)
    assert list(map(int, printed[1::2])) == tokens.tolist()


@pytest.mark.parametrize("op", KERNELS)
def test_every_file_of_kernels_serves_the_op_of_its_name(op):
    assert op in OPS and BACKENDS[op]["cuda"] == "native"
