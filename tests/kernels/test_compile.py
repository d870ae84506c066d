"""Every Triton kernel compiles ahead of time for an A100 and an H200, without spills and within their shared memory."""

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from compare import filled

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 166912, 90: 232448}  # bytes a block may take
# by Triton and capability: what spills a few registers, and does not with Triton 3.9
SPILL = {
    ("3.6", 80): {"sample_tokens_kernel"},
    ("3.6", 90): {"sample_tokens_kernel", "ppo_policy_loss_total_kernel"},
    ("3.7", 80): {"sample_tokens_kernel"},
    ("3.7", 90): {"sample_tokens_kernel", "ppo_policy_loss_total_kernel", "decode_attention_kernel"},
    ("3.8", 90): {"sample_tokens_kernel", "ppo_policy_loss_total_kernel"},
}

pytest.importorskip("triton", reason="Triton is not installed, so CUDA takes the references: pip install -e .[gpu]")


def compile_all(capability, *options):
    """What compile_all.py says of each kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment |= {"PYTHONPATH": paths, "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/kernels/compile_all.py", str(capability), *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module", params=SHARED_MEMORY)
def compiled(request):
    return request.param, compile_all(request.param)


def kernels():
    """The names of the functions of kernels/ that are launched: decorated with triton.jit and named *_kernel."""
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert ast.unparse(node.decorator_list[0]).startswith("triton.jit"), f"{path}: {node.name}"
                yield node.name


def test_every_kernel_is_compiled(compiled):
    assert {facts["kernel"] for facts in compiled[1]} == set(kernels()), "name it *_kernel and launch it in LAUNCHES"


def test_no_kernel_spills_registers_but_those_that_are_known_to(compiled):
    capability, found = compiled
    spill = {facts["kernel"] for facts in found if facts["STACK"]}
    assert spill <= SPILL.get((version("triton").rpartition(".")[0], capability), set())


def test_shared_memory_is_within_the_limit(compiled):
    capability, found = compiled
    assert not [facts for facts in found if facts["shared"] > SHARED_MEMORY[capability]]


def test_grids_are_within_the_limits(compiled):
    for facts in filled(compiled[1]):
        assert 0 < facts["grid"][0] < 2**31 and all(0 < size < 2**16 for size in facts["grid"][1:]), facts


@pytest.mark.slow
def test_what_the_contract_tests_launch_compiles():
    assert compile_all(90, "samples")
