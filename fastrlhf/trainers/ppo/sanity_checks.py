"""What must hold before the first update of PPO: otherwise nothing that is learned after it could be trusted."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf.errors import MachineError
from fastrlhf.models.offload import onloaded
from fastrlhf.models.policy import Policy
from fastrlhf.ops import approx_kl

# largest mean |ratio - 1|. In half precision the sampler rounds logits, which the trainer does not: SmolLM2 has 0.03
MAX_RATIO_ERROR = {"exact": 1e-5, "half": 0.2}
MAX_KL = {"exact": 1e-5, "half": 1e-3}  # of equal weights, nats a token


def check_first_step(
    policy: Policy, reference: Policy, sampled: Tensor, logprobs: Tensor, ref_logprobs: Tensor, *, half: bool
) -> str | None:
    """Checks log-probabilities (R,) of the first responses. Returns a line on a KL that is not 0, or None.

    sampled: of the sampler; logprobs: of the trainer; ref_logprobs: of the reference
    half: whether the policy computes in half precision, or something else than its module samples

    Raises: RuntimeError when sampler and trainer disagree, or a reference with the same weights has a KL."""
    precision = "half" if half else "exact"
    error = ((logprobs - sampled).exp() - 1).abs().mean().item()
    kl = approx_kl(logprobs, ref_logprobs, estimator="k1").mean().item()
    if not error <= MAX_RATIO_ERROR[precision]:
        raise MachineError(
            f"PPO: before the first update the mean |ratio - 1| is {error:.2e}: sampler and trainer disagree on "
            "the log-probabilities of the same tokens, so nothing learned from them could be trusted"
        )
    with onloaded(reference):
        same_weights = have_same_weights(policy, reference)
    if not same_weights:
        return f"the reference is another model: KL before the first update is {kl:.4f} nats a token"
    if not abs(kl) <= MAX_KL[precision]:
        raise MachineError(f"PPO: policy and reference have equal weights, yet their KL is {kl:.2e} nats a token")
    return None


def have_same_weights(first: Policy, second: Policy) -> bool:
    """Whether two models compute with equal weights."""
    if first.model is second.model:
        return all(policy.adapter is None or policy.adapter.is_zero for policy in (first, second))
    ours, theirs = list(first.parameters()), list(second.parameters())
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )
