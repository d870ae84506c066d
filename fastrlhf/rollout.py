"""Generation: prompts in, sampled responses with their log-probabilities out.

The engine runs the policy's own module, so there is one copy of the weights and nothing to synchronise. Prompts are
read packed, then every step decodes one token of each running sequence. Finished sequences leave at once and waiting
prompts take their slots, so no step is spent on padding. A response depends on its prompt and its seed alone, up to
rounding: not on the other prompts, their order or the number of slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from fastrlhf.attention import ATTENTION
from fastrlhf.ops.sample_tokens import sample_tokens
from fastrlhf.ops.token_logprobs import token_logprobs
from fastrlhf.packing import pack
from fastrlhf.slots import Slots

PREFILL_TOKENS = 4096  # of one packed prompt pass, which bounds its memory


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: see `sample_tokens`; `greedy` takes the most likely one instead.

    max_new_tokens: a response ends after so many tokens if not by EOS
    min_new_tokens: EOS is not drawn before so many tokens"""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_new_tokens: int = 0
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"Sampling: max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            expected = f"min_new_tokens must be from 0 to max_new_tokens={self.max_new_tokens}"
            raise ValueError(f"Sampling: {expected}, got {self.min_new_tokens}")
        if not 0 < self.temperature < float("inf"):
            advice = "; for the most likely token set greedy" if self.temperature == 0 else ""
            raise ValueError(f"Sampling: temperature must be above 0 and finite, got {self.temperature}{advice}")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            expected = "top_k must be at least 0, top_p in (0, 1] and min_p in [0, 1]"
            raise ValueError(f"Sampling: {expected}, got {self.top_k}, {self.top_p} and {self.min_p}")


@dataclass(frozen=True)
class Sample:
    """A response: its tokens with EOS if it has `finished`, and two log-probabilities of each.

    logprobs: given the tokens before, at the sampling temperature
    sampler_logprobs: what the draw followed, after top-k, top-p, min-p and min_new_tokens; 0 if greedy"""

    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    sampler_logprobs: list[float]
    finished: bool


@dataclass
class _Rows:
    """The running sequences, (n,) int64 each; row n lives in slot n."""

    number: Tensor  # of its prompt
    seed: Tensor
    limit: Tensor  # of new tokens
    length: Tensor  # tokens in the cache
    count: Tensor  # tokens drawn
    token: Tensor  # the last one drawn, not yet in the cache

    def __len__(self) -> int:
        return self.number.shape[0]

    def columns(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def select(self, index: Tensor | slice) -> _Rows:
        return _Rows(*(column[index] for column in self.columns()))

    def join(self, other: _Rows) -> _Rows:
        return _Rows(*map(torch.cat, zip(self.columns(), other.columns(), strict=True)))


class _Record:
    """What was drawn for each prompt, (prompts, max_new_tokens), kept on the device until the end."""

    def __init__(self, num_prompts: int, max_new_tokens: int, device: torch.device) -> None:
        shape = num_prompts, max_new_tokens
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.sampler_logprobs = torch.zeros(shape, device=device)
        self.lengths = torch.zeros(num_prompts, dtype=torch.int64, device=device)
        self.finished = torch.zeros(num_prompts, dtype=torch.bool, device=device)

    def samples(self, prompts: Sequence[Sequence[int]]) -> list[Sample]:
        columns = (self.tokens, self.logprobs, self.sampler_logprobs)
        rows = zip(prompts, *(c.tolist() for c in (*columns, self.lengths, self.finished)), strict=True)
        return [Sample(list(p), t[:n], lp[:n], slp[:n], done) for p, t, lp, slp, n, done in rows]


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

        prompts: token ids of each prompt, none empty
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
        num_slots = min(self.max_slots, len(prompts))
        self.slots.reserve(num_slots, max(len(p) + n for p, n in zip(prompts, budgets, strict=True)))
        with _evaluating(self.model), torch.no_grad():
            return self._run(prompts, sampling, seeds, budgets, num_slots, progress or (lambda _: None))

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

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        budgets: Sequence[int],
        num_slots: int,
        progress: Callable[[int], object],
    ) -> list[Sample]:
        device = self.model.device
        record = _Record(len(prompts), sampling.max_new_tokens, device)
        eos = torch.tensor(self.eos_token_ids, dtype=torch.int64, device=device)
        zeros = [0] * len(prompts)
        facts = [list(range(len(prompts))), seeds, budgets, [len(p) for p in prompts], zeros, zeros]
        waiting = _Rows(*torch.tensor(facts, dtype=torch.int64).to(device))
        rows = waiting.select(slice(0))
        refill = max(1, num_slots // 8)  # a prompt pass costs about a decode step, so slots are refilled together
        read = 0  # prompts that have had a slot
        while len(rows) or read < len(prompts):
            free = num_slots - len(rows)
            if read < len(prompts) and free >= refill:
                end = _end_of_pack(prompts, read, free)
                new, drawn = waiting.select(slice(read, end)), end - read
                logits = self._prefill(prompts[read:end], len(rows))
                done = self._draw(new, logits, sampling, eos, record)
                done = torch.cat([done.new_zeros(len(rows)), done])
                rows, read = rows.join(new), end
            else:
                drawn = len(rows)
                done = self._draw(rows, self._decode(rows), sampling, eos, record)
            rows = self._drop(rows, done)
            progress(drawn)
        return record.samples(prompts)

    def _prefill(self, prompts: Sequence[Sequence[int]], first: int) -> Tensor:
        """Reads prompts into the slots from `first` on; returns the logits (n, V) of their first new tokens."""
        batch = pack(prompts, device=self.model.device)
        self.slots.prefill(batch, first)
        logits: Tensor = self.model(**batch.model_inputs(), slots=self.slots, logits_to_keep=batch.last_rows).logits
        return logits[0]

    def _decode(self, rows: _Rows) -> Tensor:
        """One more token through the model for each row; returns the logits (n, V) of the next."""
        self.slots.decode(rows.length)
        inputs = {"input_ids": rows.token[:, None], "position_ids": rows.length[:, None], "attention_mask": None}
        logits: Tensor = self.model(**inputs, use_cache=False, slots=self.slots).logits[:, 0]
        rows.length = rows.length + 1
        return logits

    def _draw(self, rows: _Rows, logits: Tensor, sampling: Sampling, eos: Tensor, record: _Record) -> Tensor:
        """Draws and records a token for each row; returns (n,) bool, True where that ends the response."""
        tokens, logprobs, sampler_logprobs = _choose(logits, rows, sampling, eos)
        at = rows.number, rows.count
        record.tokens[at], record.logprobs[at], record.sampler_logprobs[at] = tokens, logprobs, sampler_logprobs
        rows.token, rows.count = tokens, rows.count + 1
        finished = torch.isin(tokens, eos)
        record.lengths[rows.number], record.finished[rows.number] = rows.count, finished
        return finished | (rows.count >= rows.limit)

    def _drop(self, rows: _Rows, done: Tensor) -> _Rows:
        """The rows that go on, moved into the first slots: the last ones fill the gaps, the others stay."""
        ended, lengths = torch.stack([done.long(), rows.length]).cpu()  # the only wait for the device in a step
        if not ended.any():
            return rows
        kept = (ended == 0).nonzero()[:, 0]
        order = torch.arange(len(kept))
        gaps, movers = ended[: len(kept)].nonzero()[:, 0], kept[kept >= len(kept)]
        order[gaps] = movers
        self.slots.move(movers.to(done.device), gaps.to(done.device))
        self.slots.longest = max(lengths[kept].tolist(), default=0)
        return rows.select(order.to(done.device))


def _choose(logits: Tensor, rows: _Rows, sampling: Sampling, eos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    allowed = logits
    if sampling.min_new_tokens:
        young = rows.count < sampling.min_new_tokens
        allowed = logits.index_fill(1, eos, -torch.inf).where(young[:, None], logits)
    if sampling.greedy:
        tokens = allowed.argmax(-1)
        logprobs = cast(Tensor, token_logprobs(logits, tokens, temperature=sampling.temperature))
        return tokens, logprobs, torch.zeros_like(logprobs)
    tokens, logprobs, sampler_logprobs = sample_tokens(
        allowed,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seeds=rows.seed,
        positions=rows.count,
    )
    if sampling.min_new_tokens:
        logprobs = cast(Tensor, token_logprobs(logits, tokens, temperature=sampling.temperature))
    return tokens, logprobs, sampler_logprobs


def _end_of_pack(prompts: Sequence[Sequence[int]], first: int, free: int) -> int:
    """The end of the prompts from `first` on that fit into the free slots and one packed pass: at least one."""
    end, num_tokens = first + 1, len(prompts[first])
    while end < min(len(prompts), first + free) and num_tokens + len(prompts[end]) <= PREFILL_TOKENS:
        num_tokens += len(prompts[end])
        end += 1
    return end


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
