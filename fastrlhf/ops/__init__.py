"""The ops, one file each: documentation, checks, reference, native launchers, gradient, samples.

Letters in shapes: T tokens of a pack, N sequences, R response tokens, V vocabulary, D hidden width, H query heads,
K head width. A second derivative raises (k1 of `approx_kl`, a subtraction, has one). Each op compiles to one graph
(`torch.compile(fullgraph=True)`), backward included, with every option but `inplace_backward` of `token_logprobs`.
"""

from fastrlhf.ops._named import names_arguments
from fastrlhf.ops.approx_kl import approx_kl
from fastrlhf.ops.decode_attention import decode_attention
from fastrlhf.ops.discounted_returns import discounted_returns
from fastrlhf.ops.gae import gae
from fastrlhf.ops.group_advantages import group_advantages
from fastrlhf.ops.kl_divergence import kl_divergence
from fastrlhf.ops.linear_cross_entropy import linear_cross_entropy
from fastrlhf.ops.linear_dpo_loss import linear_dpo_loss
from fastrlhf.ops.linear_kl_divergence import linear_kl_divergence
from fastrlhf.ops.linear_ppo_loss import linear_ppo_loss
from fastrlhf.ops.linear_token_logprobs import linear_token_logprobs
from fastrlhf.ops.masked_whiten import masked_whiten
from fastrlhf.ops.packed_attention import packed_attention
from fastrlhf.ops.pairwise_reward_loss import pairwise_reward_loss
from fastrlhf.ops.ppo_advantages import ppo_advantages
from fastrlhf.ops.ppo_policy_loss import ppo_policy_loss
from fastrlhf.ops.ranking_loss import ranking_loss
from fastrlhf.ops.rms_norm import rms_norm
from fastrlhf.ops.rotary import rotary
from fastrlhf.ops.sample_tokens import sample_tokens
from fastrlhf.ops.silu_mul import silu_mul
from fastrlhf.ops.thin_linear import thin_linear
from fastrlhf.ops.token_logprobs import token_logprobs
from fastrlhf.ops.value_loss import value_loss

__all__ = [
    "approx_kl",
    "decode_attention",
    "discounted_returns",
    "gae",
    "group_advantages",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_kl_divergence",
    "linear_ppo_loss",
    "linear_token_logprobs",
    "masked_whiten",
    "packed_attention",
    "pairwise_reward_loss",
    "ppo_advantages",
    "ppo_policy_loss",
    "ranking_loss",
    "rms_norm",
    "rotary",
    "sample_tokens",
    "silu_mul",
    "thin_linear",
    "token_logprobs",
    "value_loss",
]

for _name in __all__:
    globals()[_name] = names_arguments(globals()[_name])
