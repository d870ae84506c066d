"""Generation: prompts in, sampled responses with their log-probabilities out.

The engine runs the policy's own module, so there is one copy of the weights and nothing to synchronise. Prompts are
read packed, then every step decodes one token of each running sequence. Finished sequences leave at once and waiting
prompts take their slots, so no step is spent on padding. A prompt that is repeated, for several samples, is read once
and its keys and values are copied. A response depends on its prompt and its seed alone, up to rounding: not on the
other prompts, their order or the number of slots.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn import Module
from transformers import PreTrainedModel

from fastrlhf.attention import ATTENTION
from fastrlhf.decoding import Run, make_rows
from fastrlhf.sampling import Sample, Sampling
from fastrlhf.slots import Slots

__all__ = ["Engine", "Sample", "Sampling"]


class Engine:
    """Samples from `model`, a transformers causal LM on our attention (models.load_causal_lm).

    eos_token_ids: tokens that end a response
    max_slots: most sequences decoded at once; the cache holds so many of the longest one, and is kept between calls"""

    def __init__(self, model: PreTrainedModel, *, eos_token_ids: Collection[int], max_slots: int = 64) -> None:
        if max_slots < 1:
            raise ValueError(f"Engine: max_slots must be at least 1, got {max_slots}")
        if model.config._attn_implementation != ATTENTION:
            got = model.config._attn_implementation
            raise ValueError(f"Engine: the model must be on attention {ATTENTION!r} (load_causal_lm), got {got!r}")
        self.model = model
        self.max_slots = max_slots
        self.eos_token_ids = sorted(eos_token_ids)
        self.slots = Slots()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> list[Sample]:
        """Returns a sample for each prompt, in their order.

        prompts: token ids of each prompt, none empty; one repeated side by side, for several samples, is read once
        seeds: a number for each prompt: the same prompt, seed and sampling give the same response
        limits: most new tokens of each prompt, where that is less than sampling.max_new_tokens
        progress: called after every step with the number of tokens drawn in it

        Runs in eval mode without gradients, under the caller's autocast; the training mode is restored after.
        Raises: ValueError for prompts that are empty, hold unknown tokens, or do not fit the model's context together
        with their new tokens; for seeds or limits that do not fit; for NaN logits (on the CPU)."""
        if not prompts:
            return []
        budgets = [sampling.max_new_tokens] * len(prompts) if limits is None else list(limits)
        self._check(prompts, seeds, budgets, sampling)
        rows, num_slots = make_rows(prompts, seeds, budgets), min(self.max_slots, len(prompts))
        repeated = rows[-1].group < len(rows) - 1
        self.slots.reserve(num_slots + repeated, max(len(p) + n for p, n in zip(prompts, budgets, strict=True)))
        run = Run(self.model, self.slots, rows, sampling, num_slots, self.eos_token_ids)
        with _evaluating(self.model), torch.no_grad():
            while num_drawn := run.step():
                if progress is not None:
                    progress(num_drawn)
        return [row.sample() for row in rows]

    def _check(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], budgets: Sequence[int], sampling: Sampling
    ) -> None:
        for name, given in (("seeds", seeds), ("limits", budgets)):
            if len(given) != len(prompts):
                raise ValueError(f"Engine: {name} must be one a prompt, {len(prompts)} in all, got {len(given)}")
        for i, seed in enumerate(seeds):
            if not -(2**63) <= seed < 2**63:
                raise ValueError(f"Engine: seeds must fit 64 bits, got {seed} for prompt {i}")
        vocab_size = self.model.config.vocab_size
        context = getattr(self.model.config, "max_position_embeddings", None)
        for i, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
            if not prompt:
                raise ValueError(f"Engine: prompt {i} is empty")
            if min(prompt) < 0 or max(prompt) >= vocab_size:
                raise ValueError(
                    f"Engine: tokens must be in [0, {vocab_size}), prompt {i} has {min(prompt)} to {max(prompt)}"
                )
            if not 1 <= budget <= sampling.max_new_tokens:
                expected = f"limits must be from 1 to max_new_tokens={sampling.max_new_tokens}"
                raise ValueError(f"Engine: {expected}, got {budget} for prompt {i}")
            if context is not None and len(prompt) + budget > context:
                sizes = f"{len(prompt)} prompt tokens and {budget} new ones"
                raise ValueError(f"Engine: prompt {i} does not fit: {sizes}, but the model's context is {context}")


@contextmanager
def _evaluating(model: Module) -> Iterator[None]:
    """The model in eval mode, then every module in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
