"""Losses of preference pairs and labelled responses, from how likely a policy makes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf.settings.training import DPOConfig


def pair_losses(config: DPOConfig, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Returns the loss (N,) of each pair, without label smoothing's or supervised learning's part of other configs.

    chosen, rejected: (N,) log-probabilities of the responses, sums over their tokens, less those of the reference where
    there is one; means over their tokens with length_normalized, and for simpo and orpo

    With h = chosen - rejected and beta, eps (label_smoothing), gamma (target_margin) of the config:
    sigmoid: -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)   (Rafailov et al., arXiv 2305.18290, equation 7;
        eps: Mitchell, "A note on DPO with noisy preferences", 2023)
    ipo: (h - 1 / (2 beta))^2   (Azar et al., arXiv 2310.12036, equation 17)
    hinge: max(0, 1 - beta h)   (Zhao et al., arXiv 2305.10425, with a reference as in Liu et al., arXiv 2309.06657)
    simpo: -log sigmoid(beta h - gamma)   (Meng et al., arXiv 2405.14734, equation 6)
    orpo: -chosen - beta log sigmoid(log odds(chosen) - log odds(rejected)), log odds(x) = x - log(1 - e^x)
        (Hong et al., arXiv 2403.07691, equations 6 and 7)"""
    h, beta, eps = chosen - rejected, config.beta, config.label_smoothing
    if config.loss == "sigmoid":
        return -(1 - eps) * F.logsigmoid(beta * h) - eps * F.logsigmoid(-beta * h)
    if config.loss == "ipo":
        return (h - 1 / (2 * beta)).square()
    if config.loss == "hinge":
        return (1 - beta * h).relu()
    if config.loss == "simpo":
        return -F.logsigmoid(beta * h - config.target_margin)
    odds = h - (log_complement(chosen) - log_complement(rejected))
    return -chosen - beta * F.logsigmoid(odds)


def labelled_losses(config: DPOConfig, ratios: Tensor, labels: Tensor, kl: Tensor) -> Tensor:
    """Returns the loss (N,) of each labelled response.

    ratios: (N,) log-probabilities of the responses, less those of the reference; labels: (N,) the probability that a
    response is wanted; kl: (), at least 0, without a gradient

    p lambda_D (1 - sigmoid(beta (ratio - kl))) + (1 - p) lambda_U (1 - sigmoid(beta (kl - ratio))), with p the label
    and lambda_D, lambda_U the desirable and undesirable_weight of the config
    (Ethayarajh et al., arXiv 2402.01306, equation 8, where p is 1 or 0)"""
    x = config.beta * (ratios - kl)
    wanted, unwanted = config.desirable_weight * (-x).sigmoid(), config.undesirable_weight * x.sigmoid()
    return labels * wanted + (1 - labels) * unwanted


def log_complement(x: Tensor) -> Tensor:
    """Returns log(1 - e^x) for x < 0, without cancellation at either end (Maechler, "Accurately computing log(1 -
    exp(-|a|))", 2012). A response of probability 1 is held one rounding below it."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
