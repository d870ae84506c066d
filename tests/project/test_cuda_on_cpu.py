"""The stand-in for CUDA itself: it runs what is right and shows what is wrong."""

import signal
import subprocess
import sys

import pytest
import torch
from cuda_kernels import SHIM, Kernels, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

SOURCE = """
#include "kernel.h"
#include "launch.h"
namespace FASTRLHF_ISA {
namespace {
__global__ void neighbours(const int* x, int* y, bool barrier) {
  __shared__ int all[96];
  const int i = threadIdx.x, at = blockIdx.x * blockDim.x + i;
  all[i] = x[at];
  if (barrier) __syncthreads();
  y[at] = all[(i + 1) % 96] + __shfl_xor_sync(0xffffffffu, all[i], 5) + __shfl_down_sync(0xffffffffu, all[i], 2);
}
__global__ void diverge() {
  if (threadIdx.x < 32) __syncthreads();
  else __syncwarp();
  if (threadIdx.x >= 32) return;
  __syncthreads();
  if (threadIdx.x) __syncthreads();
  else __syncwarp();
}
void run_neighbours(const int* x, int* y, int64_t blocks, bool barrier, cudaStream_t stream) {
  FASTRLHF_LAUNCH(neighbours, blocks, 96, stream, x, y, barrier);
}
void run_diverge(cudaStream_t stream) { FASTRLHF_LAUNCH(diverge, 1, 64, stream); }
FASTRLHF_KERNEL(neighbours, run_neighbours)
FASTRLHF_KERNEL(diverge, run_diverge)
}  // namespace
}  // namespace FASTRLHF_ISA
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    source = tmp_path_factory.mktemp("shim") / "example.cu"
    source.write_text(SOURCE)
    return Kernels(source, source.parent)


def neighbours(kernels, x, *, barrier, descending):
    y = torch.empty_like(x)
    kernels.run_descending(descending)
    kernels.neighbours(x.data_ptr(), y.data_ptr(), len(x), barrier, 0)
    return y


@pytest.mark.parametrize("descending", [False, True])
def test_shared_memory_barriers_and_shuffles_do_what_cuda_says(kernels, descending):
    x = torch.randint(0, 1000, (7, 96), dtype=torch.int32)
    lanes = torch.arange(32)
    warps = x.view(7, 3, 32)
    down = torch.where(lanes + 2 < 32, warps.roll(-2, 2), warps)
    expected = x.roll(-1, 1) + warps[:, :, lanes ^ 5].view(7, 96) + down.reshape(7, 96)
    assert torch.equal(neighbours(kernels, x, barrier=True, descending=descending), expected)


def test_a_missing_barrier_shows_when_the_order_is_turned(kernels):
    x = torch.randint(0, 1000, (7, 96), dtype=torch.int32)
    up = neighbours(kernels, x, barrier=False, descending=False)
    assert not torch.equal(up, neighbours(kernels, x, barrier=False, descending=True))


def test_threads_at_different_barriers_stop_the_run(kernels, tmp_path):
    (tmp_path / "example.cu").write_text(SOURCE)
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(SHIM.parent)!r})
from cuda_kernels import Kernels
Kernels(pathlib.Path({str(tmp_path / "example.cu")!r}), pathlib.Path({str(tmp_path)!r})).diverge(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT and "wait at different barriers" in done.stderr
