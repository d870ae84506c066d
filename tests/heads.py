"""Losses on linear heads with one signature, their formulas on whole logits, inputs, and the products they make."""

import torch
import torch.nn.functional as F
from torch.autograd.profiler import profile

from fastrlhf import linear_cross_entropy, linear_dpo_loss, linear_ppo_loss, linear_token_logprobs

D, V = 40, 900


def logprobs(hidden, weight, targets, **options):
    """One scalar of the two outputs, and the two."""
    outputs = linear_token_logprobs(hidden, weight, targets, return_entropy=True, **options)
    return outputs[0].sum() + 0.3 * outputs[1].sum(), outputs


def cross_entropy(hidden, weight, targets, **options):
    return linear_cross_entropy(hidden, weight, targets, denominator=1, **options), ()


def ppo(hidden, weight, targets, **options):
    """With quantities of a row that depend on its target alone."""
    old, advantages = (
        x.to(torch.promote_types(hidden.dtype, torch.float32)) for x in (-6 + targets / V, 1 - targets % 3)
    )
    options = {"denominator": 1, "entropy_coef": 0.1} | options
    return linear_ppo_loss(hidden, weight, targets, old, advantages, **options)[0], ()


def dpo(hidden, weight, targets, **options):
    """Each row the chosen response of a pair, beside an empty one."""
    cu_seqlens = (torch.arange(2 * len(targets) + 1) + 1).div(2, rounding_mode="floor").to(torch.int32)
    ref = (-6 + targets / V).to(torch.promote_types(hidden.dtype, torch.float32))
    return linear_dpo_loss(hidden, weight, targets, cu_seqlens, ref, denominator=1, **options)[0], ()


LOSSES = [logprobs, cross_entropy, ppo, dpo]


def inputs(num_rows, dtype=torch.float32):
    weight = (torch.randn(V, D) / 4).to(dtype)
    return torch.randn(num_rows, D).to(dtype), weight, torch.randint(V, (num_rows,))


def factors(rank, dtype=torch.float32):
    """a and b of a low-rank change of the weight."""
    return (torch.randn(rank, D) / 4).to(dtype), torch.randn(V, rank).to(dtype)


def products(function):
    """The shapes of the first factor of each matrix product that the function makes."""
    with profile(record_shapes=True) as recorded:
        function()
    first = {"aten::mm": 0, "aten::addmm_": 1}
    return [e.input_shapes[first[e.name]] for e in recorded.function_events if e.name in first]


def exact(loss, logits, targets):
    """The loss, one of LOSSES, of whole logits, by its formula."""
    table = logits.log_softmax(-1)
    own, entropy = table.gather(1, targets[:, None])[:, 0], -(table.exp() * table).sum(1)
    old, advantages = -6 + targets / V, 1 - targets % 3
    if loss is logprobs:
        return own.sum() + 0.3 * entropy.sum()
    if loss is cross_entropy:
        return -own.sum()
    if loss is dpo:
        return -F.logsigmoid(0.1 * (own - old)).sum()
    ratio = (own - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() - 0.1 * entropy.sum()
