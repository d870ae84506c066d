"""Losses of preference pairs and labelled responses, from how likely a policy makes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_losses(
    chosen: Tensor,
    rejected: Tensor,
    *,
    loss: str,
    beta: float,
    label_smoothing: float = 0.0,
    target_margin: float = 0.0,
) -> Tensor:
    """Returns the loss (N,) of each pair.

    chosen, rejected: (N,) float, log-probabilities of the responses, nats, less those of the reference where there is
    one: sums over their tokens, or means over them, as always for simpo and orpo

    With h = chosen - rejected, eps = label_smoothing and gamma = target_margin:
    sigmoid: -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)   (Rafailov et al., arXiv 2305.18290, equation 7;
        eps: Mitchell, "A note on DPO with noisy preferences", 2023)
    ipo: (h - 1 / (2 beta))^2   (Azar et al., arXiv 2310.12036, equation 17)
    hinge: max(0, 1 - beta h)   (Zhao et al., arXiv 2305.10425, with a reference as in Liu et al., arXiv 2309.06657)
    simpo: -log sigmoid(beta h - gamma)   (Meng et al., arXiv 2405.14734, equation 6)
    orpo: -chosen - beta log sigmoid(log odds(chosen) - log odds(rejected)), log odds(x) = x - log(1 - e^x)
        (Hong et al., arXiv 2403.07691, equations 6 and 7)

    Raises: ValueError for another loss."""
    h, eps = chosen - rejected, label_smoothing
    if loss == "sigmoid":
        return -(1 - eps) * F.logsigmoid(beta * h) - eps * F.logsigmoid(-beta * h)
    if loss == "ipo":
        return (h - 1 / (2 * beta)).square()
    if loss == "hinge":
        return (1 - beta * h).relu()
    if loss == "simpo":
        return -F.logsigmoid(beta * h - target_margin)
    if loss == "orpo":
        log_odds_ratio = h - (log_complement(chosen) - log_complement(rejected))
        return -chosen - beta * F.logsigmoid(log_odds_ratio)
    raise ValueError(f"pair_losses: loss must be sigmoid, ipo, hinge, simpo or orpo, got {loss!r}")


def labelled_losses(
    ratios: Tensor,
    labels: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Returns the loss (N,) of each labelled response.

    p lambda_D (1 - sigmoid(beta (ratio - kl))) + (1 - p) lambda_U (1 - sigmoid(beta (kl - ratio))), with p the label,
    lambda_D = desirable_weight and lambda_U = undesirable_weight

    ratios: (N,) float, log-probabilities of the responses, nats, less those of the reference
    labels: (N,) like ratios, the probability that a response is wanted
    kl: (), of the policy to the reference, nats, at least 0, without a gradient

    Source: Ethayarajh et al., arXiv 2402.01306, equation 8, where p is 1 or 0."""
    x = beta * (ratios - kl)
    wanted, unwanted = desirable_weight * (-x).sigmoid(), undesirable_weight * x.sigmoid()
    return labels * wanted + (1 - labels) * unwanted


def log_complement(x: Tensor) -> Tensor:
    """Returns log(1 - e^x) for x < 0, without cancellation at either end (Maechler, "Accurately computing log(1 -
    exp(-|a|))", 2012). A response of probability 1 is held one rounding below it."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
