"""AdamW with a stateless schedule, clipping, and a stop at the first number that is not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(FloatingPointError):
    """A loss or gradient became NaN or infinite. The weights are those before the step."""


def learning_rate_at(step: int, *, peak: float, num_steps: int, num_warmup_steps: int, schedule: str) -> float:
    """Returns the learning rate of step 0, 1, ...: a linear rise, then constant, or falling to 0 at num_steps.

    linear: peak (1 - p);  cosine: peak (1 + cos(pi p)) / 2, p the share of the steps after the warm-up that is done."""
    if step < num_warmup_steps:
        return peak * (step + 1) / num_warmup_steps
    done = (step - num_warmup_steps) / max(num_steps - num_warmup_steps, 1)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    return peak


class Optimizer:
    """AdamW for one model. Matrices decay, vectors (norms, biases) do not.

    num_steps: steps of the whole run, which the schedule falls over"""

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        num_steps: int,
        schedule: str,
        warmup_ratio: float,
        weight_decay: float,
        eps: float,
        max_grad_norm: float,
    ) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=eps, fused=True)
        self.parameters = parameters
        self.max_grad_norm = max_grad_norm
        self.schedule = {
            "peak": learning_rate,
            "num_steps": num_steps,
            "num_warmup_steps": round(warmup_ratio * num_steps),
            "schedule": schedule,
        }
        self.num_steps_done = 0

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate_at(self.num_steps_done, **self.schedule)  # type: ignore[arg-type]

    def step(self, where: str) -> Tensor:
        """Clips the gradients, updates the parameters, clears the gradients. Returns the norm before clipping.

        Raises: NonFiniteError, naming `where`, before anything is changed."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if not bool(norm.isfinite()):
            raise NonFiniteError(
                f"the gradient norm is {norm.item()} at {where}: the loss or its gradient is not finite"
            )
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.num_steps_done += 1
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "num_steps_done": self.num_steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        self.num_steps_done = state["num_steps_done"]
