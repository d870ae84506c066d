"""Rows on their way through the slots: prompts are read, tokens drawn, ended rows leave, waiting ones follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.generation.kv_cache import KVCache
from fastrlhf.generation.sampling import Sample, Sampling
from fastrlhf.generation.stopping import StopStrings, repeats
from fastrlhf.ops.sample_tokens import sample_tokens
from fastrlhf.ops.token_logprobs import token_logprobs
from fastrlhf.packing import pack

PREFILL_TOKENS = 4096  # of one packed prompt pass, which bounds its memory


@dataclass
class Row:
    """A response on its way. group: the same for neighbours with the same prompt."""

    number: int
    prompt: list[int]
    group: int
    seed: int
    limit: int
    stop: StopStrings | None
    response: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    finished: bool = False

    @property
    def num_cached(self) -> int:
        """Tokens of it in its slot: all but the last one drawn."""
        return len(self.prompt) + len(self.response) - 1

    def sample(self) -> Sample:
        return Sample(list(self.prompt), self.response, self.logprobs, self.sampler_logprobs, self.finished)


def make_rows(
    prompts: Sequence[Sequence[int]], seeds: Sequence[int], limits: Sequence[int], stop: Sequence[str], tokenizer: Any
) -> list[Row]:
    rows: list[Row] = []
    for number, (prompt, seed, limit) in enumerate(zip(map(list, prompts), seeds, limits, strict=True)):
        group = rows[-1].group + (prompt != rows[-1].prompt) if rows else 0
        rows.append(Row(number, prompt, group, seed, limit, StopStrings(tokenizer, stop) if stop else None))
    return rows


class SlotDecoder:
    """Draws responses to `rows` in at most num_slots slots; running[n] lives in slot n.

    The slot after these is the spare one: it keeps the prompt of a group of which some rows still wait.
    forward: passes (2, n) int64 on the host, the new token of each running row and its place, to logits (n, V)"""

    def __init__(
        self,
        model: PreTrainedModel,
        slots: KVCache,
        rows: Sequence[Row],
        sampling: Sampling,
        num_slots: int,
        eos_token_ids: Sequence[int],
        forward: Callable[[Tensor], Tensor],
    ) -> None:
        self.model, self.slots, self.rows, self.sampling, self.num_slots = model, slots, rows, sampling, num_slots
        self.forward = forward
        self.eos_token_ids = frozenset(eos_token_ids)
        self.running: list[Row] = []
        self.num_started = 0
        self.refill = max(1, num_slots // 8)  # a prompt pass costs about a decode step, so slots are refilled together
        self.spare_group = -1
        self.spare_logits = torch.empty(0)  # (1, V) of the token after the prompt in the spare slot

    def step(self) -> tuple[int, list[Row]]:
        """Draws a token for the rows that start, or for all that run.

        Returns how many, 0 when all rows had ended, and the rows that ended."""
        num_waiting, free = len(self.rows) - self.num_started, self.num_slots - len(self.running)
        first = 0
        if num_waiting and free >= self.refill:
            first = len(self.running)
            logits = self._start(free)
        elif self.running:
            logits = self._decode()
        else:
            return 0, []
        drawn = self.running[first:]
        self._draw(drawn, logits)
        return len(drawn), self._drop()

    def _start(self, free: int) -> Tensor:
        """Gives slots to waiting rows; returns the logits (n, V) of their first tokens.

        The model reads the prompt of the first row of each group; the others copy its slot."""
        new, first, spare = self._next_rows(free), len(self.running), self.num_slots
        source_of = {self.spare_group: spare}
        sources = [source_of.setdefault(row.group, slot) for slot, row in enumerate(new, first)]
        distinct = list(dict.fromkeys(sources))
        tables = [self.spare_logits] if distinct[0] == spare else []
        read = [slot for slot in distinct if slot != spare]
        if read:
            tables.append(self._prefill([new[slot - first].prompt for slot in read], read))
        table = torch.cat(tables) if len(tables) > 1 else tables[0]
        copies = [(source, slot) for slot, source in enumerate(sources, first) if source != slot]
        self.slots.copy(copies, max(len(row.prompt) for row in new))
        self.running += new
        self.num_started += len(new)
        if self.num_started < len(self.rows) and self.rows[self.num_started].group == new[-1].group:
            if sources[-1] != spare:
                self.slots.copy([(sources[-1], spare)], len(new[-1].prompt))
            self.spare_group, self.spare_logits = new[-1].group, table[-1:].clone()
        places = {slot: n for n, slot in enumerate(distinct)}
        return table if len(distinct) == len(new) else table[[places[source] for source in sources]]

    def _next_rows(self, free: int) -> list[Row]:
        """The waiting rows that fit into the free slots and whose prompts fit into one packed pass: at least one."""
        new: list[Row] = []
        num_tokens, group = 0, self.spare_group
        for row in self.rows[self.num_started : self.num_started + free]:
            if row.group != group:
                num_tokens, group = num_tokens + len(row.prompt), row.group
                if new and num_tokens > PREFILL_TOKENS:  # never within a group: without a spare slot all of it fits
                    break
            new.append(row)
        return new

    def _prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        """Reads prompts into slots; returns the logits (n, V) of their first new tokens."""
        batch = pack(prompts, device=self.model.device)
        self.slots.prefill(batch, slots)
        logits: Tensor = self.model(**batch.model_inputs(), slots=self.slots, logits_to_keep=batch.last_rows).logits
        return logits[0]

    def _decode(self) -> Tensor:
        """One more token through the model for each running row; returns the logits (n, V) of the next."""
        places = [row.num_cached for row in self.running]
        self.slots.grow(max(places) + 1)
        return self.forward(torch.tensor([[row.response[-1] for row in self.running], places]))

    def _draw(self, rows: Sequence[Row], logits: Tensor) -> None:
        drawn = torch.stack([column.double() for column in self._choose(rows, logits)])
        tokens, logprobs, sampler_logprobs = drawn.tolist()  # the only wait for the device in a step
        for row, token, logprob, sampler_logprob in zip(
            rows, map(int, tokens), logprobs, sampler_logprobs, strict=True
        ):
            row.response.append(token)
            row.logprobs.append(logprob)
            row.sampler_logprobs.append(sampler_logprob)
            self._judge(row)

    def _judge(self, row: Row) -> None:
        """Sets whether the row has ended and finished with the token just drawn."""
        sampling, count = self.sampling, len(row.response)
        may_end = count >= sampling.min_new_tokens
        stopped = row.stop is not None and row.stop.found(row.response)
        row.finished = row.response[-1] in self.eos_token_ids or (stopped and may_end)
        repeating = bool(sampling.repeat_ngram) and repeats(row.response, sampling.repeat_ngram, sampling.repeat_times)
        row.ended = row.finished or count >= row.limit or (repeating and may_end)

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns a token for each row, and its two log-probabilities."""
        sampling, allowed = self.sampling, logits
        seeds, counts = torch.tensor([[r.seed for r in rows], [len(r.response) for r in rows]]).to(logits.device)
        if sampling.min_new_tokens:
            eos = torch.tensor(sorted(self.eos_token_ids), dtype=torch.int64, device=logits.device)
            young = counts < sampling.min_new_tokens
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
            seeds=seeds,
            positions=counts,
        )
        if sampling.min_new_tokens:
            logprobs = cast(Tensor, token_logprobs(logits, tokens, temperature=sampling.temperature))
        return tokens, logprobs, sampler_logprobs

    def _drop(self) -> list[Row]:
        """Lets ended rows go, and returns them: the last rows move into their slots, the others stay."""
        ended = [row for row in self.running if row.ended]
        num_left = sum(not row.ended for row in self.running)
        gaps = [n for n in range(num_left) if self.running[n].ended]
        movers = [n for n in range(num_left, len(self.running)) if not self.running[n].ended]
        self.slots.copy(
            list(zip(movers, gaps, strict=True)), max((self.running[n].num_cached for n in movers), default=0)
        )
        for gap, mover in zip(gaps, movers, strict=True):
            self.running[gap] = self.running[mover]
        del self.running[num_left:]
        return ended
