"""AdamW with a stateless schedule, clipping, and a stop at the first number that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf.errors import MissingPackageError, NonFiniteError
from fastrlhf.runtime import distributed
from fastrlhf.runtime.fsdp import gathered, scattered


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


def check_finite(what: str, value: Tensor, where: str) -> None:
    """Raises NonFiniteError, naming `where` (the step and the rows of the batch), unless value is finite."""
    if not bool(value.isfinite().all()):
        raise NonFiniteError(f"{what} is {value.item()} at {where}")


def check_finite_weights(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raises NonFiniteError, naming the first parameter that is not finite: before weights are saved."""
    for name, values in parameters:
        if values.numel() and not all(bound.isfinite() for bound in values.detach().aminmax()):
            raise NonFiniteError(f"the weights {name} are not finite after the last step, so they are not saved")


class Optimizer:
    """AdamW for one model, betas (0.9, 0.95). Matrices decay, vectors (norms, biases) do not.

    num_steps: steps of the whole run, which the schedule falls over
    kind: adamw, or adamw8bit, whose moments take a byte each in tensors of 4096 numbers and more

    Raises: ModuleNotFoundError, naming the extra, for adamw8bit where bitsandbytes is not installed.
    Source: Dettmers et al., arXiv 2110.02861 (adamw8bit)."""

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
        kind: str = "adamw",
    ) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        options: dict[str, Any] = {"lr": learning_rate, "betas": (0.9, 0.95), "eps": eps}
        self.adam: torch.optim.Optimizer
        if kind == "adamw8bit":
            self.adam = eight_bit_adamw()(groups, **options)
        else:
            self.adam = torch.optim.AdamW(groups, **options, fused=True)
        self.max_grad_norm = max_grad_norm
        self.schedule: dict[str, Any] = {"peak": learning_rate, "schedule": schedule}
        self.warmup_ratio = warmup_ratio
        self.set_num_steps(num_steps)
        self.num_steps_done = 0

    def set_num_steps(self, num_steps: int) -> None:
        """Sets the steps of the whole run; the schedule goes on where it would be, had there always been so many."""
        self.schedule |= {"num_steps": num_steps, "num_warmup_steps": round(self.warmup_ratio * num_steps)}

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate_at(self.num_steps_done, **self.schedule)

    def step(self, where: str) -> Tensor:
        """Adds the gradients of all processes, clips them, updates the parameters, clears the gradients. Returns the
        norm before clipping.

        Raises: NonFiniteError, naming `where` (the step and the rows of the batch), before a parameter is changed."""
        distributed.all_reduce_gradients(self.parameters)
        norm = gathered(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        check_finite("the norm of the gradient", norm, where)
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate
        self.adam.step()
        self.drop_gradients()
        self.num_steps_done += 1
        return norm

    def drop_gradients(self) -> None:
        """Clears the gradients of a step that is not made."""
        self.adam.zero_grad(set_to_none=True)

    def checkpoint_tensors(self) -> Iterator[Tensor]:
        """The tensors that a checkpoint holds of a model and its optimizer: the trained weights and their moments."""
        yield from self.parameters
        for values in self.adam.state.values():
            yield from (value for value in values.values() if isinstance(value, Tensor))

    def state_dict(self) -> dict[str, Any]:
        """Adam's moments and the position in the schedule."""
        return {"adam": gathered(self.adam.state_dict()), "num_steps_done": self.num_steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what state_dict gave."""
        parameters = [parameter for group in self.adam.param_groups for parameter in group["params"]]
        states = {number: scattered(values, parameters[number]) for number, values in state["adam"]["state"].items()}
        self.adam.load_state_dict({**state["adam"], "state": states})
        self.num_steps_done = state["num_steps_done"]


def eight_bit_adamw() -> Any:
    """AdamW of bitsandbytes. Raises: ModuleNotFoundError, naming the extra, where it is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise MissingPackageError("optimizer=adamw8bit: pip install 'fastrlhf[bitsandbytes]'") from error
    return AdamW8bit
