"""How a gold reward goes with the distance that a policy is pushed by a proxy: the forms of Gao et al., fitted.

d = sqrt(KL(policy || initial policy)). Best-of-n: R(d) = d (alpha - beta d); PPO: R(d) = d (alpha - beta log d).

Source: Gao, Schulman and Hilton, arXiv 2210.10760, equations 1 and 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrlhf.errors import UserError


@dataclass(frozen=True)
class Fit:
    """A form with the parameters that leave the least squares.

    form: "best_of_n" or "ppo"; alpha_error, beta_error: standard errors, if deviations from the form are independent
    and alike, which those of best-of-n from the same responses are not; r_squared: 1 - their squares / those of R from
    its mean; num: points"""

    form: str
    alpha: float
    beta: float
    alpha_error: float
    beta_error: float
    r_squared: float
    num: int

    def __call__(self, kl: float) -> float:
        """R at a KL in nats."""
        first, second = features(torch.tensor([kl], dtype=torch.float64), self.form)[0].tolist()
        return self.alpha * first + self.beta * second

    @property
    def peak(self) -> tuple[float, float] | None:
        """KL and R of its maximum; None where it has none, which is where beta is not above 0 or, of best-of-n, alpha.

        Best-of-n: d = alpha / (2 beta). PPO: d = exp(alpha / beta - 1)."""
        if self.beta <= 0 or (self.form == "best_of_n" and self.alpha <= 0):
            return None
        log_d = self.alpha / self.beta - 1
        if self.form == "ppo" and log_d > 300:
            return None
        d = self.alpha / (2 * self.beta) if self.form == "best_of_n" else math.exp(log_d)
        return d * d, self(d * d)


def features(kl: Tensor, form: str) -> Tensor:
    """Returns (N, 2): what alpha and beta are multiplied by. kl: (N,) float64, above 0 where form is ppo."""
    d = kl.sqrt()
    return torch.stack([d, -d * (d if form == "best_of_n" else d.log())], 1)


def fit(kl: Tensor, reward: Tensor, form: str) -> Fit:
    """Returns the form fitted to points (N,) of KL and of the reward less that of the initial policy.

    Points with a KL of 0 or below, as estimates may be, are left out: every form is 0 there.

    Raises: ValueError for a form that is none, for fewer than three points or two distances, and for what is not
    finite."""
    if form not in ("best_of_n", "ppo"):
        raise UserError(f"fit: form must be best_of_n or ppo, got {form!r}")
    kl, reward = kl.double(), reward.double()
    if not (kl.isfinite().all() and reward.isfinite().all()):
        raise UserError("fit: kl and reward must be finite")
    kl, reward = kl[kl > 0], reward[kl > 0]
    if len(kl) < 3 or len(kl.unique()) < 2:
        raise UserError(f"fit: three points with a KL above 0 are needed, two of different KL, got {len(kl)}")
    x = features(kl, form)
    inverse = torch.linalg.inv(x.T @ x)
    alpha, beta = parameters = inverse @ x.T @ reward
    rest = (reward - x @ parameters).square().sum()
    errors = (rest / (len(kl) - 2) * inverse.diagonal()).sqrt()
    spread = (reward - reward.mean()).square().sum()
    r_squared = (1 - rest / spread).item() if spread > 1e-24 * reward.square().sum() else math.nan
    return Fit(form, alpha.item(), beta.item(), errors[0].item(), errors[1].item(), r_squared, len(kl))
