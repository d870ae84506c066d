"""Estimators of the KL divergence from the log-probs of sampled tokens: one program a block of tokens."""

import torch
import triton
import triton.language as tl


@triton.jit
def exp_minus_linear(r):
    """e^r - 1 - r. The difference cancels below 1: there the Taylor series, whose first missing term is below 2^-52."""
    series = 1.0 + r * (1.0 / 19)
    for i in tl.static_range(16):
        series = 1.0 + r * (1.0 / (18 - i)) * series
    return tl.where(tl.abs(r) < 1.0, 0.5 * r * r * series, tl.exp(r) - 1.0 - r)


@triton.jit
def approx_kl_kernel(logprobs_ptr, ref_logprobs_ptr, out_ptr, num_tokens, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr):
    """With r = ref - logprob: 1 gives -r, 2 gives r^2 / 2, 3 gives e^r - 1 - r."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < num_tokens
    logprobs = tl.load(logprobs_ptr + tokens, mask=inside, other=0.0)
    r = tl.load(ref_logprobs_ptr + tokens, mask=inside, other=0.0) - logprobs
    if ESTIMATOR == 1:
        out = -r
    elif ESTIMATOR == 2:
        out = 0.5 * r * r
    else:
        out = exp_minus_linear(r)
    tl.store(out_ptr + tokens, out, mask=inside)


def approx_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: int) -> torch.Tensor:
    """Launches the kernel on two contiguous tensors of one shape and dtype; estimator is 1, 2 or 3."""
    out = torch.empty_like(logprobs)
    block = 1024
    if out.numel():
        grid = (triton.cdiv(out.numel(), block),)
        with torch.cuda.device_of(logprobs):
            approx_kl_kernel[grid](logprobs, ref_logprobs, out, out.numel(), ESTIMATOR=estimator, BLOCK=block)
    return out
