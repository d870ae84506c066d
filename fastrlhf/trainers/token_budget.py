"""Tokens a micro-batch, and what happens when they are too many for the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from fastrlhf.errors import MachineError
from fastrlhf.runtime import distributed
from fastrlhf.runtime.checkpoint import random_state, restore_random_state
from fastrlhf.runtime.optim import Optimizer

T = TypeVar("T")


class NoMemoryError(MachineError, torch.OutOfMemoryError):
    """Memory that fewer tokens a micro-batch would not save."""


class TokenBudget:
    """The tokens of a micro-batch: `asked`, that is max_tokens, until memory runs out."""

    def __init__(self, asked: int) -> None:
        self.asked = self.tokens = asked

    def run(
        self,
        work: Callable[[int], T],
        *,
        lengths: Sequence[int],
        optimizers: Sequence[Optimizer],
        total: int | None = None,
    ) -> T:
        """Returns work(tokens): the passes of an optimizer step, which leave gradients and change nothing else.

        When memory runs out the gradients are dropped, random numbers set back and all is done again with half the
        tokens, from now on; a line says so.

        lengths: tokens of what is never cut: sequences, or pairs
        total: of all of it, where that is less than their sum: prompts in common

        Raises: torch.OutOfMemoryError, with advice, when fewer tokens would not help, or under torchrun, where it ends
        all processes."""
        before = random_state()
        while True:
            try:
                return work(self.tokens)
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            # only now: the error held what the pass that failed had allocated
            for optimizer in optimizers:
                optimizer.drop_gradients()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            restore_random_state(before)
            self._halve(reason, max(lengths), sum(lengths) if total is None else total)

    def _halve(self, reason: str, longest: int, total: int) -> None:
        used = min(self.tokens, total)
        if used <= longest:
            advice = "try gradient_checkpointing, lora_rank, or shorter sequences"
            raise NoMemoryError(f"{longest} tokens that cannot be cut do not fit: {advice} ({reason})")
        if distributed.world_size() > 1:
            raise NoMemoryError(f"resume with max_tokens below {used} on all processes ({reason})")
        self.tokens = used // 2
        distributed.print_once(f"out of memory with {used} tokens a micro-batch: {self.tokens} from here on ({reason})")

    def state_dict(self) -> dict[str, Any]:
        """What was asked for and what it has become."""
        return {"asked": self.asked, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what state_dict gave, unless something else is asked for now."""
        if state["asked"] == self.asked:
            self.tokens = state["tokens"]
