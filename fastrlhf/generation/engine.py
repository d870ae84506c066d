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
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from fastrlhf.errors import UserError
from fastrlhf.generation.decoding import Row, SlotDecoder, make_rows
from fastrlhf.generation.graphs import Graphs, recorder
from fastrlhf.generation.kv_cache import CachePlan, KVCache
from fastrlhf.generation.sampling import Sample, Sampling, checked_limits
from fastrlhf.models.attention import ATTENTION
from fastrlhf.models.lora import Adapter, use_adapter
from fastrlhf.packing import pack

__all__ = ["Engine", "Sample", "Sampling"]


class Engine:
    """A `RolloutBackend` that samples from `model`, a transformers causal LM on our attention (load_causal_lm).

    eos_token_ids: tokens that end a response
    max_slots: most sequences decoded at once; the cache may hold so many of the longest one, and is kept between calls
    kv_budget: most bytes of the cache; fewer sequences are decoded at once where it asks for that
    tokenizer: of the model, for Sampling.stop
    adapter: acts on the model's body
    cuda_graphs: whether decode steps on a GPU are replayed from CUDA graphs (under autocast in `generate` only)"""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Collection[int],
        max_slots: int = 64,
        kv_budget: int | None = None,
        tokenizer: Any = None,
        cuda_graphs: bool = True,
        adapter: Adapter | None = None,
    ) -> None:
        if max_slots < 1:
            raise UserError(f"Engine: max_slots must be at least 1, got {max_slots}")
        if model.config._attn_implementation != ATTENTION:
            got = model.config._attn_implementation
            raise UserError(f"Engine: the model must be on attention {ATTENTION!r} (load_causal_lm), got {got!r}")
        self.model, self.adapter = model, adapter
        self.max_slots, self.kv_budget = max_slots, kv_budget
        self.eos_token_ids = sorted(eos_token_ids)
        self.tokenizer = tokenizer
        self.slots = KVCache()
        self.cuda_graphs = cuda_graphs
        self._graphs: Graphs | None = None
        self._streaming = False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> list[Sample]:
        """Returns a sample for each prompt, in their order; see `stream`."""
        samples = dict(self._open(prompts, sampling, seeds, limits, progress, whole=True))
        return [samples[number] for number in range(len(samples))]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[tuple[int, Sample]]:
        """Yields (number of the prompt, its sample), each as soon as it has ended.

        prompts: token ids of each prompt, none empty; one repeated side by side, for several samples, is read once
        seeds: a number for each prompt: the same prompt, seed and sampling give the same response
        limits: most new tokens of each prompt, where that is less than sampling.max_new_tokens
        progress: called after every step with the number of tokens drawn in it

        Runs without gradients, under the caller's autocast. The model is in eval mode from the first sample until the
        iterator is read to its end or closed; then the training mode is restored. Weights may not change in between.
        Raises: ValueError for prompts that are empty, hold unknown tokens, or do not fit the model's context together
        with their new tokens; for seeds or limits that do not fit; when kv_budget does not hold one sequence; for NaN
        logits (on the CPU). RuntimeError when another stream of this engine is still open."""
        return self._open(prompts, sampling, seeds, limits, progress, whole=False)

    def cache_plan(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, limits: Sequence[int] | None = None
    ) -> CachePlan:
        """Returns what the cache would take at most for these prompts; printable. Runs one token through the model.

        Raises: as `stream`."""
        budgets = checked_limits("Engine", prompts, sampling, range(len(prompts)), limits)
        self._check(prompts, budgets, sampling)
        if not prompts:
            return CachePlan(0, 0, self.bytes_per_token())
        num_slots, num_spare, max_length = self._sizes(make_rows(prompts, budgets, budgets, (), None))
        return CachePlan(num_slots + num_spare, max_length, self.bytes_per_token())

    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers, under the caller's autocast: those of a real pass."""
        slots, batch = KVCache(), pack([[0]], device=self.model.device)
        slots.reserve(1, 1)
        slots.prefill(batch, [0])
        with _evaluating(self.model), torch.no_grad(), use_adapter(self.adapter):
            self.model(**batch.model_inputs(), slots=slots, logits_to_keep=1)
        return slots.num_bytes

    def _sizes(self, rows: Sequence[Row]) -> tuple[int, int, int]:
        """Slots that run, spare slots and the longest sequence, within the budget."""
        num_slots, max_length = min(self.max_slots, len(rows)), max(len(row.prompt) + row.limit for row in rows)
        repeated = rows[-1].group < len(rows) - 1
        if self.kv_budget is None:
            return num_slots, int(repeated and num_slots < len(rows)), max_length
        bytes_per_token = self.bytes_per_token()
        fitting = self.kv_budget // (max_length * bytes_per_token)
        num_slots = min(num_slots, fitting)
        num_spare = int(repeated and num_slots < len(rows))
        num_slots = min(num_slots, fitting - num_spare)
        if num_slots < 1:
            needed = CachePlan(1 + num_spare, max_length, bytes_per_token)
            raise UserError(f"Engine: kv_budget is {self.kv_budget / 2**20:,.1f} MiB, but one sequence needs {needed}")
        return num_slots, num_spare, max_length

    def _open(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        limits: Sequence[int] | None,
        progress: Callable[[int], object] | None,
        *,
        whole: bool,
    ) -> Iterator[tuple[int, Sample]]:
        """The stream. whole: it is read to its end at once, so the caller's autocast stays as it is."""
        budgets = checked_limits("Engine", prompts, sampling, seeds, limits)
        self._check(prompts, budgets, sampling)
        rows = make_rows(prompts, seeds, budgets, sampling.stop, self.tokenizer)
        return self._stream(rows, sampling, *self._sizes(rows), progress, whole) if rows else iter(())

    def _stream(
        self,
        rows: Sequence[Row],
        sampling: Sampling,
        num_slots: int,
        num_spare: int,
        max_length: int,
        progress: Callable[[int], object] | None,
        whole: bool,
    ) -> Iterator[tuple[int, Sample]]:
        if self._streaming:
            raise RuntimeError("Engine: another stream of this engine is open; read it to its end or close it")
        self._streaming = True
        try:
            self.slots.reserve(num_slots + num_spare, max_length)
            forward = self._decoder(num_slots, whole)
            run = SlotDecoder(self.model, self.slots, rows, sampling, num_slots, self.eos_token_ids, forward)
            with _evaluating(self.model):
                while True:
                    with (
                        torch.no_grad(),
                        use_adapter(self.adapter),
                    ):  # not around the yield: they would act in the caller
                        num_drawn, ended = run.step()
                    if num_drawn == 0:
                        return
                    if progress is not None:
                        progress(num_drawn)
                    for row in ended:
                        yield row.number, row.sample()
        finally:
            self._streaming = False
            if self._graphs is not None and torch.is_autocast_enabled(self.model.device.type):
                self._graphs.clear()  # autocast drops its copies of the weights, which they read

    def _decoder(self, num_slots: int, whole: bool) -> Callable[[Tensor], Tensor]:
        """The function that SlotDecoder asks for logits: the model, or graphs of it."""
        device = self.model.device
        record = recorder(device) if self.cuda_graphs else None
        autocast = torch.is_autocast_enabled(device.type)
        if record is None or (autocast and not whole):
            return self._forward
        if self._graphs is None or self._graphs.inputs.device != device:
            self._graphs = Graphs(self._forward, record, max_rows=self.max_slots, device=device)
        graphs, state = self._graphs, (autocast, torch.get_autocast_dtype(device.type))
        own = () if self.adapter is None else self.adapter.parameters()
        weights = [t.data_ptr() for t in chain(self.model.parameters(), self.model.buffers(), own)]
        return lambda inputs: graphs(inputs, num_slots=num_slots, addresses=(self.slots.version, state, weights))

    def _forward(self, inputs: Tensor) -> Tensor:
        """One token of each row through the model: (2, n) int64, tokens and their places, to logits (n, V)."""
        tokens, places = inputs.to(self.model.device)
        self.slots.decode(places)
        given = {"input_ids": tokens[:, None], "position_ids": places[:, None], "attention_mask": None}
        logits: Tensor = self.model(**given, use_cache=False, slots=self.slots).logits[:, 0]
        return logits

    def _check(self, prompts: Sequence[Sequence[int]], budgets: Sequence[int], sampling: Sampling) -> None:
        if sampling.stop and self.tokenizer is None:
            raise UserError(f"Engine: stop={sampling.stop!r} is text, which needs Engine(..., tokenizer=)")
        vocab_size = self.model.config.vocab_size
        context = getattr(self.model.config, "max_position_embeddings", None)
        for i, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
            if min(prompt) < 0 or max(prompt) >= vocab_size:
                raise UserError(
                    f"Engine: tokens must be in [0, {vocab_size}), prompt {i} has {min(prompt)} to {max(prompt)}"
                )
            if context is not None and len(prompt) + budget > context:
                sizes = f"{len(prompt)} prompt tokens and {budget} new ones"
                raise UserError(f"Engine: prompt {i} does not fit: {sizes}, but the model's context is {context}")


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
