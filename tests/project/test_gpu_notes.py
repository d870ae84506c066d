"""benchmarks/GPU_NOTES.md has every GPU kernel, and numbers that follow from the declared shapes."""

from pathlib import Path

import pytest

from benchmarks.gpu_cases import CASES
from benchmarks.gpu_model import Case, Launch
from benchmarks.gpu_notes import page
from fastrlhf.ops._registry import BACKENDS

ROOT = Path(__file__).parents[2]


def test_the_notes_are_what_the_script_prints():
    text = (ROOT / "benchmarks/GPU_NOTES.md").read_text()
    assert text == page(), "stale: python -m benchmarks.gpu_notes > benchmarks/GPU_NOTES.md"


def test_every_op_that_a_gpu_kernel_serves_is_in_the_notes():
    served = {op for op, backends in BACKENDS.items() if backends["cuda"] == "native"}
    noted = {case.op for case in CASES}
    composed = {op for op in served if op.startswith("linear_")}  # of matrix products and the kernels of other ops
    assert served - composed <= noted <= BACKENDS.keys()


def test_every_file_of_gpu_kernels_is_in_the_notes():
    files = {*ROOT.glob("kernels/*.py"), *ROOT.glob("csrc/cuda/*.cu")} - {ROOT / "csrc/cuda/module.cu"}
    assert {ROOT / case.source for case in CASES} == files


def test_nothing_is_predicted_to_beat_its_floor():
    assert [case.op for case in CASES if case.predicted()[0] < case.floor()] == []


def test_the_floor_of_a_read_of_bf16_logits_is_the_time_of_their_bytes():
    case = next(case for case in CASES if case.op == "token_logprobs")
    assert case.floor() == pytest.approx(8192 * 128256 * 2 / 4.3e12, rel=1e-3)


@pytest.mark.parametrize(("size", "hbm", "l2"), [(40e6, 40e6, 40e6), (60e6, 120e6, 0.0)])
def test_a_second_launch_finds_in_l2_what_fits_there(size, hbm, l2):
    case = Case("x", "", "", [Launch("first", 1, [("x", size, 1)]), Launch("second", 1, [("x", size, 1)])], "")
    assert [sum(column) for column in zip(*case.traffic(), strict=True)] == [hbm, l2]
    assert case.needed() == size
