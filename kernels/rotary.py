"""Rotary position embedding, and its transpose, which is its gradient: one program a token and head."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rotary_kernel(
    states_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    num_heads,
    half,
    TRANSPOSED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < half
    first, second = program * 2 * half + places, program * 2 * half + half + places
    angle = program // num_heads * 2 * half + places
    x = tl.load(states_ptr + first, mask=inside, other=0.0).to(WIDE)
    y = tl.load(states_ptr + second, mask=inside, other=0.0).to(WIDE)
    sin_x = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(WIDE)
    sin_y = tl.load(sin_ptr + angle + half, mask=inside, other=0.0).to(WIDE)
    cos_x = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(WIDE)
    cos_y = tl.load(cos_ptr + angle + half, mask=inside, other=0.0).to(WIDE)
    if TRANSPOSED:
        to_x, to_y = y * sin_y, -x * sin_x
    else:
        to_x, to_y = -y * sin_x, x * sin_y
    tl.store(out_ptr + first, x * cos_x + to_x, mask=inside)
    tl.store(out_ptr + second, y * cos_y + to_y, mask=inside)


def rotary(states: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """states: (T, H, K); cos, sin: (T, K); all contiguous and of one dtype."""
    out = torch.empty_like(states)
    num_tokens, num_heads, width = states.shape
    if out.numel():
        with torch.cuda.device_of(states):
            rotary_kernel[(num_tokens * num_heads,)](
                states,
                cos,
                sin,
                out,
                num_heads,
                width // 2,
                TRANSPOSED=transposed,
                WIDE=tl.float64 if states.dtype == torch.float64 else tl.float32,
                BLOCK=triton.next_power_of_2(width // 2),
                num_warps=1 if width <= 256 else 4,
            )
    return out
