"""Log-probabilities of tokens straight from hidden states: stand-in on full logits until the chunked op lands."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns logprobs (T,) float32 of targets under softmax(hidden @ weight.T + bias), and entropies (T,) if asked."""
    logits = F.linear(hidden, weight, bias).float() * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    rows = (logits / temperature).log_softmax(-1)
    logprobs = rows.gather(-1, targets[:, None])[:, 0]
    return (logprobs, -(rows.exp() * rows).sum(-1)) if return_entropy else logprobs
