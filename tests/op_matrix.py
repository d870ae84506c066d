"""What each operator takes, gives and is served by: stated here, and compared with what is registered.

The contract tests take their cases from this table, so a dtype, an op or a backend that gets lost fails a test.
"""

from typing import NamedTuple

import torch

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
WIDE, ALL = (F32, F64), (F16, BF16, F32, F64)


class Row(NamedTuple):
    """takes: the dtypes of its floating-point inputs
    gives: a letter for each output. x: the dtype of the inputs; w: that, but float32 for half precision; d: float64;
    i: int64; b: bool
    gpu: what serves a GPU: Triton (kernels/), CUDA (csrc/cuda), chunks (torch's products around the kernels of
    another op) or torch (the reference)
    grads: the arguments that get a gradient; backward: the operators of the backward that have kernels of their own"""

    takes: tuple[torch.dtype, ...]
    gives: str
    gpu: str
    grads: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()


HEAD = ("hidden", "weight", "bias", "lora_a", "lora_b")
HEADS = ("hidden_p", "weight_p", "bias_p", "lora_a_p", "lora_b_p", "hidden_q", "weight_q", "bias_q")
MATRIX = {
    "approx_kl": Row(WIDE, "x", "Triton", ("logprobs", "ref_logprobs")),
    "decode_attention": Row(ALL, "x", "Triton"),
    "discounted_returns": Row(WIDE, "x", "CUDA"),
    "gae": Row(WIDE, "xx", "CUDA"),
    "group_advantages": Row(WIDE, "x", "CUDA"),
    "kl_divergence": Row(
        ALL, "ww", "Triton", ("logits_p", "logits_q"), ("kl_divergence_backward", "kl_divergence_backward_")
    ),
    "linear_cross_entropy": Row(ALL, "wwwwww", "chunks", HEAD),
    "linear_dpo_loss": Row(ALL, "wwwwwww", "chunks", HEAD),
    "linear_kl_divergence": Row(
        ALL, "www", "chunks", (*HEADS, "lora_a_q", "lora_b_q"), ("linear_kl_divergence_backward",)
    ),
    "linear_ppo_loss": Row(ALL, "wwwwwww", "chunks", HEAD),
    "linear_token_logprobs": Row(ALL, "wwwwwb", "chunks", HEAD, ("linear_token_logprobs_backward",)),
    "masked_moments": Row(WIDE, "d", "CUDA"),
    "masked_whiten": Row(WIDE, "x", "CUDA"),
    "packed_attention": Row(WIDE, "xx", "torch", ("query", "key", "value"), ("packed_attention_backward",)),
    "pairwise_reward_loss": Row(WIDE, "xxxx", "CUDA", ("chosen", "rejected")),
    "ppo_advantages": Row(WIDE, "xxxx", "CUDA"),
    "ppo_policy_loss": Row(WIDE, "xxx", "Triton", ("logprobs",)),
    "ppo_sequence_loss": Row(WIDE, "xxx", "Triton", ("logprobs",)),
    "ranking_loss": Row(WIDE, "xxx", "CUDA", ("scores",)),
    "rms_norm": Row(ALL, "x", "Triton", ("hidden", "weight"), ("rms_norm_backward",)),
    "rotary": Row(ALL, "x", "Triton", ("states",)),
    "sample_tokens": Row(ALL, "iww", "Triton"),
    "silu_mul": Row(ALL, "x", "Triton", ("gate", "up"), ("silu_mul_backward",)),
    "thin_linear": Row(WIDE, "x", "torch"),
    "token_logprobs": Row(ALL, "wwww", "Triton", ("logits",), ("token_logprobs_backward", "token_logprobs_backward_")),
    "value_loss": Row(WIDE, "xxx", "Triton", ("values",)),
}
INTERNAL = {"masked_moments", "ppo_sequence_loss"}  # served through masked_whiten and ppo_policy_loss
DIFFERENTIABLE = [name for name, row in MATRIX.items() if row.grads]
CASES = [(name, dtype) for name, row in MATRIX.items() for dtype in row.takes]
GRADIENT_CASES = [(name, dtype) for name, dtype in CASES if MATRIX[name].grads and dtype != F64]  # gradcheck has that


def outputs_of(row: Row, dtype: torch.dtype) -> list[torch.dtype]:
    """The dtypes of the outputs for inputs of a dtype."""
    kinds = {"x": dtype, "w": torch.promote_types(dtype, F32), "d": F64, "i": torch.int64, "b": torch.bool}
    return [kinds[letter] for letter in row.gives]
