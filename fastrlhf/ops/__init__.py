"""The ops, one file each: documentation, checks, reference, native launchers, gradient, samples.

Letters in shapes: T tokens of a pack, N sequences, R response tokens, V vocabulary, D hidden width, H query heads,
K head width.
"""

from fastrlhf.ops.gae import gae

__all__ = [
    "gae",
]
