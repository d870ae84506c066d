"""Compiles Triton kernels as they are launched, without a GPU, and prints what each takes, one JSON line each.

    compile_all.py CAPABILITY [samples]     the launches of LAUNCHES, and those of the ops' samples

A process of its own: it puts a driver in place of Triton's that answers for a GPU which is not there.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from interpreter import KERNELS
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastrlhf.ops._registry import OPS

BF16, FP32, FP64, I64 = torch.bfloat16, torch.float32, torch.float64, torch.int64


def logits(dtype, num_rows=8, size=128256):
    wide = torch.promote_types(dtype, FP32)
    rows = [torch.empty(num_rows, dtype=wide) for _ in range(5)]
    targets, temperature = torch.empty(num_rows, dtype=I64), torch.empty(1, dtype=wide)
    return torch.empty(num_rows, size, dtype=dtype), targets, temperature, rows


def token_logprobs(dtype):
    x, targets, temperature, _ = logits(dtype)
    yield "token_logprobs", (x, targets, temperature)
    yield "token_logprobs", (x[:, 1:], targets, temperature.expand(8))


def token_logprobs_backward(dtype):
    x, targets, temperature, (g, h, *statistics) = logits(dtype)
    for upstream in ((g, h), (g, None), (None, h)):
        yield "token_logprobs_backward", (*upstream, x, targets, temperature, *statistics)


def kl_divergence(dtype):
    for jensen_shannon in (False, True):
        yield "kl_divergence", (logits(dtype)[0], logits(dtype)[0], 0.8, jensen_shannon)


def kl_divergence_backward(dtype):
    wide = torch.promote_types(dtype, FP32)
    saved = torch.ones(8, dtype=wide), logits(dtype)[0], logits(dtype)[0], torch.empty(8, 6, dtype=wide)
    for jensen_shannon in (False, True):
        for wanted in ([True, True], [True, False], [False, True]):
            yield "kl_divergence_backward", (*saved, 0.8, jensen_shannon, wanted)


def approx_kl(dtype):
    for estimator in (1, 2, 3):
        yield "approx_kl", (torch.empty(2**20, dtype=dtype), torch.empty(2**20, dtype=dtype), estimator)


def ppo_policy_loss(dtype):
    mask, tensors = torch.empty(2**20, dtype=torch.bool), [torch.empty(2**20, dtype=dtype) for _ in range(3)]
    yield "ppo_policy_loss", (*tensors, None, 0.2, 0.28, None, 1000.0)
    yield "ppo_policy_loss", (*tensors, mask, 0.2, 0.28, 3.0, None)


def ppo_sequence_loss(dtype):
    mask, tensors = torch.empty(2**20, dtype=torch.bool), [torch.empty(2**20, dtype=dtype) for _ in range(3)]
    cu_seqlens = torch.arange(0, 2**20 + 1, 2**10, dtype=torch.int32)
    yield "ppo_sequence_loss", (*tensors, cu_seqlens, None, 3e-4, 4e-4, None, 1000.0)
    yield "ppo_sequence_loss", (*tensors, cu_seqlens, mask, 3e-4, 4e-4, 3.0, None)


def value_loss(dtype):
    mask, tensors = torch.empty(2**20, dtype=torch.bool), [torch.empty(2**20, dtype=dtype) for _ in range(3)]
    yield "value_loss", (*tensors, None, 0.2, 1000.0)
    yield "value_loss", (*tensors, mask, 0.2, None)


def sample_tokens(dtype):
    x, seeds, *_ = logits(dtype)
    for cut in ((0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0), (50, 0.9, 0.05)):
        yield "sample_tokens", (x, seeds, torch.empty_like(seeds), 0.8, *cut)


def decode_attention(dtype):
    lengths = torch.zeros(2, dtype=torch.int32)
    for num_heads, num_kv_heads, max_length, width, window in (
        (32, 8, 600, 128, 0),
        (8, 8, 200, 64, 0),
        (8, 1, 600, 256, 100),
    ):
        query = torch.empty(2, num_heads, width, dtype=dtype)
        caches = torch.empty(2, 2, num_kv_heads, max_length, width, dtype=dtype)
        yield "decode_attention", (query, *caches, lengths, 0.1, window)


def rms_norm(dtype):
    for width in (64, 4096, 8192):
        yield "rms_norm", (torch.empty(8, width, dtype=dtype), torch.empty(width, dtype=dtype), 1e-6)


def rms_norm_backward(dtype):
    for width in (64, 4096, 8192)[: 2 if dtype == FP64 else 3]:  # which nobody trains in: there it spills
        rows = torch.empty(8, width, dtype=dtype)
        yield "rms_norm_backward", (rows, rows, torch.empty(width, dtype=dtype), 1e-6)


def rotary(dtype):
    angles = torch.empty(8, 128, dtype=dtype)
    for transposed in (False, True):
        yield "rotary", (torch.empty(8, 32, 128, dtype=dtype), angles, angles, transposed)


def silu_mul(dtype):
    yield "silu_mul", [torch.empty(8, 14336, dtype=dtype)] * 2


def silu_mul_backward(dtype):
    yield "silu_mul_backward", [torch.empty(8, 14336, dtype=dtype)] * 3


LAUNCHES = {  # what calls the kernels at the sizes of training -> the dtypes it is called in
    approx_kl: (FP32, FP64),
    ppo_policy_loss: (FP32, FP64),
    ppo_sequence_loss: (FP32, FP64),
    value_loss: (FP32, FP64),
    sample_tokens: (BF16, FP32, FP64),
    decode_attention: (BF16, FP32, FP64),
    kl_divergence: (BF16, FP32, FP64),
    kl_divergence_backward: (BF16, FP32, FP64),
    rms_norm: (BF16, FP32, FP64),
    rms_norm_backward: (BF16, FP32, FP64),
    rotary: (BF16, FP32, FP64),
    silu_mul: (BF16, FP32, FP64),
    silu_mul_backward: (BF16, FP32, FP64),
    token_logprobs: (BF16, FP32, FP64),
    token_logprobs_backward: (BF16, FP32, FP64),
}


class Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability  # under which Triton keeps what it compiled

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


def resources(cubin):
    """REG, STACK and so on, as cuobjdump reports them."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", done.stdout + done.stderr)}


def launches():
    """(operator, arguments) of every call in LAUNCHES."""
    for calls, dtypes in LAUNCHES.items():
        for dtype in dtypes:
            for name, args in calls(dtype):
                yield getattr(torch.ops.fastrlhf, name).default, args


def samples():
    """(operator, arguments) of every sample of the ops that kernels/ serves: what the contract tests launch."""
    for name in KERNELS:
        for dtype in (FP32, FP64):
            for args in OPS[name].samples("cpu", dtype):
                yield OPS[name].forward, args


def main(capability, calls):
    triton.runtime.driver.set_active(Driver(capability))
    run, seen = JITFunction.run, set()

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            facts = {"kernel": self.fn.__name__, "grid": grid, "shared": kernel.metadata.shared}
            print(json.dumps({**facts, **resources(kernel.asm["cubin"])}), flush=True)

    JITFunction.run = compile_only
    for operator, args in calls:
        operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)


if __name__ == "__main__":
    main(int(sys.argv[1]), samples() if "samples" in sys.argv else launches())
