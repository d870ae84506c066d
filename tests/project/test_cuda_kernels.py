"""csrc/cuda without a GPU: the real source run on the CPU, and what nvcc makes of it."""

import contextlib
import re
import shutil
import subprocess
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from compare import assert_accurate, filled, flat, to_double
from cuda_kernels import CSRC, SOURCES, Kernels, compiler

from fastrlhf.ops import _launch
from fastrlhf.ops._registry import OPS

ARCHS = ("80", "90", "100", "120")
LAUNCHERS = {  # .cu file, and module of fastrlhf.ops -> op -> its launcher there
    "discounted_returns": {"discounted_returns": "_cuda_forward"},
    "gae": {"gae": "_cuda_forward"},
    "group_advantages": {"group_advantages": "_cuda_forward"},
    "masked_whiten": {"masked_moments": "_cuda_moments", "masked_whiten": "_cuda_whiten"},
    "pairwise_reward_loss": {"pairwise_reward_loss": "_cuda_forward"},
    "ppo_advantages": {"ppo_advantages": "_cuda_forward"},
    "ranking_loss": {"ranking_loss": "_cuda_forward"},
}
OF_OPS = {op: (stem, name) for stem, ops in LAUNCHERS.items() for op, name in ops.items()}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """stem -> Kernels, each compiled once."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    done, folder = {}, tmp_path_factory.mktemp("cuda_on_cpu")
    return lambda stem: done.get(stem) or done.setdefault(stem, Kernels(SOURCES[stem], folder))


@pytest.fixture
def on_cpu(compiled, monkeypatch):
    """on_cpu(op)(*args) is the op's CUDA launcher, with the kernels of its .cu file run on the CPU."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))

    def launcher(op, *, descending=False):
        stem, name = OF_OPS[op]
        function, kernels = getattr(import_module(f"fastrlhf.ops.{stem}"), name), compiled(stem)

        def run(*args):
            monkeypatch.setattr(_launch, "_cuda", kernels)
            kernels.run_descending(descending)
            return function(*args)

        return run

    return launcher


def test_every_cuda_file_serves_an_op_that_is_tested_here():
    assert LAUNCHERS.keys() == SOURCES.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("op", OF_OPS)
def test_cuda_source_is_as_accurate_as_torch(op, dtype, on_cpu, poisoned):
    for i, args in filled(enumerate(OPS[op].samples("cpu", dtype))):
        exact, plain = OPS[op].reference(*to_double(args)), OPS[op].reference(*args)
        assert_accurate(on_cpu(op)(*args), exact, plain, f"{op} sample {i}")


@pytest.mark.parametrize("op", OF_OPS)
def test_order_of_threads_and_blocks_does_not_change_a_bit(op, on_cpu):
    for args in filled(OPS[op].samples("cpu", torch.float32)):
        up = [x.clone() for x in flat(on_cpu(op)(*args))]
        for first, second in filled(zip(up, flat(on_cpu(op, descending=True)(*args)), strict=True)):
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("gaps", [False, True])
def test_gae_of_segments_longer_than_a_tile_equals_the_cpu_kernel(gaps, on_cpu):
    lengths = [5000, 2048, 0, 2049, 1, 4096]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    rewards, values = torch.randn(2, sum(lengths), dtype=torch.float64)
    mask, last = torch.rand(sum(lengths)) < 0.6, torch.randn(len(lengths), dtype=torch.float64)
    mask[1000:4500] = False
    args = rewards, values, cu_seqlens, mask, last, 0.999, 0.998, gaps
    for actual, expected in filled(zip(on_cpu("gae")(*args), OPS["gae"](*args), strict=True)):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_moments_of_many_blocks_are_those_of_numpy(masked, on_cpu):
    x = 1e6 + torch.randn(20_000)
    mask = torch.rand(20_000) < 0.3 if masked else None
    kept = (x if mask is None else x[mask]).numpy().astype("float64")
    expected = torch.tensor([len(kept), kept.mean(), kept.var() * len(kept)], dtype=torch.float64)
    torch.testing.assert_close(on_cpu("masked_moments")(x, mask), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("n", [16384, 16385, 70_000])  # one block that gathers and whitens, then many of each
@pytest.mark.parametrize("center", [True, False])
def test_whitening_by_one_block_and_by_many_is_that_of_numpy(n, center, on_cpu, poisoned):
    x, mask = 1e3 + torch.randn(n), torch.rand(n) < 0.3
    kept = x[mask].numpy().astype("float64")
    white = (kept - kept.mean()) / kept.std() + (0 if center else kept.mean())
    up, down = (on_cpu("masked_whiten", descending=d)(x, mask, None, center, 0.0) for d in (False, True))
    torch.testing.assert_close(up[mask], torch.from_numpy(white).float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(up, down) and not up[~mask].any()


@pytest.mark.parametrize("stem", SOURCES)
def test_nvcc_compiles_it_for_every_architecture_without_spills(stem, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-std=c++17", "-O3", f"-I{CSRC}", "-DFASTRLHF_ISA=cuda", "-Xptxas", "-v", "-c"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    done = subprocess.run([*command, "-o", str(tmp_path / "out.o"), str(SOURCES[stem])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", done.stderr)
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert {arch for _, arch in kernels} == set(ARCHS) and len(kernels) == len(used) == len(registers)
    assert all(found == ("0", "0", "0") for found in used), dict(zip(kernels, used, strict=True))
