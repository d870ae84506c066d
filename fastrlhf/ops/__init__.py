"""The ops, one file each: documentation, checks, reference, native launchers, gradient, samples.

Letters in shapes: T tokens of a pack, N sequences, R response tokens, V vocabulary, D hidden width, H query heads,
K head width.
"""

from fastrlhf.ops.decode_attention import decode_attention
from fastrlhf.ops.gae import gae
from fastrlhf.ops.sample_tokens import sample_tokens

__all__ = [
    "decode_attention",
    "gae",
    "sample_tokens",
]
