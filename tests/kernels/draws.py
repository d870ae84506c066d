"""draws.py FILE: for the arguments of sample_tokens that torch.save wrote there, the Triton `uniform` in hexadecimal
and the token drawn by it, one row a line."""

import sys

import torch
import triton
import triton.language as tl

from fastrlhf.kernels.sample_tokens import sample_tokens, uniform


@triton.jit
def uniform_kernel(seeds_ptr, positions_ptr, out_ptr):
    n = tl.program_id(0)
    tl.store(out_ptr + n, uniform(tl.load(seeds_ptr + n), tl.load(positions_ptr + n)))


if __name__ == "__main__":
    logits, seeds, positions, *options = torch.load(sys.argv[1])
    out = torch.empty(len(seeds), dtype=torch.float64)
    uniform_kernel[(len(seeds),)](seeds, positions, out)
    tokens, *_ = sample_tokens(logits, seeds, positions, *options)
    for number, token in zip(out.tolist(), tokens.tolist(), strict=True):
        print(number.hex(), token)
