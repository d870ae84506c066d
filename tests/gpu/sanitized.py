"""sanitized.py [wild]: launches the kernels of csrc/cuda on the samples of their ops, and prints these ops as JSON.

Bounds and rows are also made wrong, which the kernels must survive: nobody looks at them before. With `wild` it is one
launch that reads far outside its tensors. compute-sanitizer runs both."""

import json
import sys

import torch
from torch import Tensor

from fastrlhf import _cuda
from fastrlhf.ops._registry import OPS

BOUNDS = ("cu_seqlens", "cu_groups", "rows", "chosen_rows", "rejected_rows")


def launch_all():
    # the modules of ops with a kernel in csrc/cuda import if_built
    ops = {name: op for name, op in OPS.items() if hasattr(sys.modules[op.samples.__module__], "if_built")}
    for op in ops.values():
        for dtype in (torch.float32, torch.float64):
            for sample in op.samples("cpu", dtype):  # torch's own kernels are not to be sanitized
                for by in (0, -7, 7, 10**6):
                    named = zip(op.parameters, sample, strict=True)
                    args = [a + by if name in BOUNDS and isinstance(a, Tensor) else a for name, a in named]
                    op(*(a.cuda() if isinstance(a, Tensor) else a for a in args))
        torch.cuda.synchronize()
    print(json.dumps(list(ops)))


def launch_wild():
    few, size = torch.zeros(10).cuda(), 10**7
    bounds = torch.tensor([0, size], dtype=torch.int32).cuda()
    addresses = few.data_ptr(), bounds.data_ptr(), few.data_ptr()
    _cuda.discounted_returns_float32(*addresses, size, 1, 1.0, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()


if __name__ == "__main__":
    launch_wild() if sys.argv[1:] == ["wild"] else launch_all()
