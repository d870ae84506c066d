"""The table of tests/op_matrix.py is what is registered and what lies in the folders of kernels."""

import importlib.util
from pathlib import Path

import pytest
import torch
from compare import filled, flat
from op_matrix import ALL, INTERNAL, MATRIX, WIDE, outputs_of
from torch import Tensor

import fastrlhf
from fastrlhf import ops
from fastrlhf.ops import _launch
from fastrlhf.ops._registry import BACKENDS, OPS

ROOT = Path(__file__).parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None


def test_the_table_names_every_op():
    assert OPS.keys() == MATRIX.keys()
    assert {*ops.__all__} == MATRIX.keys() - INTERNAL
    assert {*ops.__all__} <= {*fastrlhf.__all__}


def test_every_operator_is_served_by_what_the_table_says():
    """A kernel on the CPU always; on a GPU what is built: Triton or nvcc may be missing, and a reference stands in."""
    built = {"Triton": HAS_TRITON, "chunks": HAS_TRITON, "CUDA": _launch._cuda is not None, "torch": False}
    expected = {
        operator: {"cpu": "native", "cuda": "native" if built[row.gpu] else "reference"}
        for name, row in MATRIX.items()
        for operator in (name, *row.backward)
    }
    assert expected == BACKENDS


def test_every_file_of_kernels_is_in_the_table():
    """masked_moments is in the files of masked_whiten, ppo_sequence_loss on the CPU in that of ppo_policy_loss."""

    def stems(pattern):
        return {path.stem for path in ROOT.glob(pattern)} - {"module"}

    def served(*kinds):
        return {name for name, row in MATRIX.items() if row.gpu in kinds}

    assert stems("kernels/*.py") == served("Triton")
    assert stems("csrc/cuda/*.cu") == served("CUDA") - {"masked_moments"}
    assert stems("csrc/cpu/*.cpp") == served("Triton", "CUDA", "torch") - INTERNAL


@pytest.mark.parametrize("name", MATRIX)
def test_every_sample_gives_outputs_of_the_stated_dtypes(name):
    for dtype in filled(MATRIX[name].takes):
        samples = list(OPS[name].samples("cpu", dtype))
        assert samples
        for args in filled(samples[:3]):
            assert [output.dtype for output in flat(OPS[name](*args))] == outputs_of(MATRIX[name], dtype)


@pytest.mark.parametrize("name", [name for name, row in MATRIX.items() if row.takes == WIDE])
def test_half_precision_is_refused_by_its_name_where_the_table_leaves_it_out(name):
    for dtype in {*ALL} - {*WIDE}:
        with pytest.raises(TypeError, match=f"got {str(dtype).removeprefix('torch.')}$"):
            OPS[name](*next(iter(OPS[name].samples("cpu", dtype))))


@pytest.mark.parametrize("name", [name for name, row in MATRIX.items() if row.gpu != "chunks"])
def test_a_tensor_of_another_dtype_than_the_first_is_refused_by_name(name):
    """A kernel reads addresses: a tensor of a narrower dtype would be read beyond its end."""
    samples = [args for args in OPS[name].samples("cpu", torch.float32) if args[0].numel() > 1]
    assert samples
    for args in samples[:8]:
        _, *others = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
        for i in others:
            other = torch.float32 if args[i].dtype == torch.float64 else torch.float64
            with pytest.raises(TypeError, match=rf"must be .*, got {str(other).removeprefix('torch.')}$"):
                OPS[name](*args[:i], args[i].to(other), *args[i + 1 :])


@pytest.mark.parametrize("name", MATRIX)
def test_the_arguments_with_a_gradient_are_those_of_the_table(name):
    assert OPS[name].grads == MATRIX[name].grads
