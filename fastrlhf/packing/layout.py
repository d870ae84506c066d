"""The one layout: sequences laid end to end, with the rows of their response tokens.

Alignment is stated here and nowhere else. A *response token* is one that a loss or a reward looks at: what the policy
sampled, or the completion of a demonstration. Every per-token quantity of a loop (logprobs, values, rewards,
advantages, ...) is a tensor (R,) over the response tokens of the pack, in order, cut into sequences by
`cu_responses`. `logprobs[r]` is the log-probability of response token r given the tokens before it, and `values[r]` the
value of the state before it, so both read the hidden state at `predictors[r]`, the row before the token or, where a
sequence goes on from one before it, the last row of what they share. The score of a whole sequence reads the
hidden state of its last token, `last_rows`. No other code shifts by one.

There is no padding, so there are no padding masks: masks come from lengths, never from `ids == pad`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastrlhf.packing.microbatches import carry, groups, packs, shares, wholes_of


@dataclass(frozen=True)
class Packed:
    """N sequences of T tokens in all, R of them response tokens.

    tokens: (T,) int64
    position_ids: (T,) int64, restarting at 0 in each sequence
    cu_seqlens: (N + 1,) int32, sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1]
    response_rows: (R,) int64, row of each response token
    predictors: (R,) int64, row whose hidden state predicts each response token
    cu_responses: (N + 1,) int32, the response tokens of sequence n are cu_responses[n] to cu_responses[n + 1]
    lengths, response_lengths: the same lengths on the host, so that nobody waits for the device to learn them
    prefix_lengths: where a sequence goes on from the start of the last one before it that is whole, how many tokens of
        that it does not repeat but sees (its positions begin there); 0 elsewhere, () where none does
    fields: per-response-token tensors (R, ...) by name
    """

    tokens: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    response_rows: Tensor
    predictors: Tensor
    cu_responses: Tensor
    lengths: tuple[int, ...]
    response_lengths: tuple[int, ...]
    prefix_lengths: tuple[int, ...] = ()
    fields: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """T, of which a prefix that sequences have in common is a part once."""
        return sum(self.lengths)

    @property
    def full_lengths(self) -> tuple[int, ...]:
        """The tokens of each sequence from its start, its prefix among them."""
        return tuple(map(sum, zip(self.lengths, self._prefixes, strict=True)))

    @property
    def num_tokens_unshared(self) -> int:
        """The tokens of the sequences one by one, each with its prefix."""
        return sum(self.full_lengths)

    @property
    def num_response_tokens(self) -> int:
        """R, the number of response tokens."""
        return sum(self.response_lengths)

    @property
    def targets(self) -> Tensor:
        """(R,) the response tokens."""
        return self.tokens[self.response_rows]

    @property
    def last_rows(self) -> Tensor:
        """(N,) row of the last token of each sequence."""
        return self.cu_seqlens[1:].long() - 1

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    def with_fields(self, **fields: Tensor) -> Packed:
        """The same pack with more per-response-token tensors."""
        for name, values in fields.items():
            if values.shape[:1] != (self.num_response_tokens,):
                raise ValueError(
                    f"Packed: field {name} must be ({self.num_response_tokens}, ...), got {tuple(values.shape)}"
                )
        return dataclasses.replace(self, fields={**self.fields, **fields})

    def select(self, indices: Sequence[int]) -> Packed:
        """The pack of the given sequences, in the given order, with their fields.

        A sequence whose prefix is not before it there takes it along."""
        carried = carry(indices, self._wholes, self.lengths, self._prefixes)
        lengths = tuple(self.lengths[i] + n for i, n in zip(indices, carried, strict=True))
        response_lengths = tuple(self.response_lengths[i] for i in indices)
        pieces = [(self._response_starts[i], self.response_lengths[i]) for i in indices]
        responses = _ranges(pieces).to(self.tokens.device)
        moved = [end - self._starts[i + 1] for i, end in zip(indices, accumulate(lengths), strict=True)]
        shifts = _integers(moved).repeat_interleave(_integers(response_lengths)).to(self.tokens.device)
        return _packed(
            self.tokens[self._rows(indices, carried)],
            self.response_rows[responses] + shifts,
            lengths,
            response_lengths,
            [self._prefixes[i] - n for i, n in zip(indices, carried, strict=True)],
            {name: values[responses] for name, values in self.fields.items()},
        )

    def microbatches(
        self, max_tokens: int, *, together: int | Sequence[int] = 1, share: tuple[int, int] = (0, 1)
    ) -> list[Packed]:
        """The pack cut, in order, into packs of at most max_tokens tokens.

        together: so many neighbours stay in one pack (2 for preference pairs), or how many of each group in turn do
        share: (number, of): cut only what `share_of` gives; all shares get as many packs, the last ones of some being
        fillers: the pack's first sequences once more, without response tokens
        A sequence (or group) longer than max_tokens is alone in its pack: it is never cut."""
        if max_tokens < 1:
            raise ValueError(f"microbatches: max_tokens must be at least 1, got {max_tokens}")
        number, of = share
        units = groups(self.num_sequences, together)
        cut = [
            packs([unit for unit in units if unit.start in own], self.lengths, self._prefixes, max_tokens)
            for own in shares(units, self.lengths, of)
        ]
        if of == 1 and len(cut[0]) == 1:
            return [self]
        num_fillers = max(map(len, cut)) - len(cut[number])
        return [*(self.select(sequences) for sequences in cut[number]), *[self._filler(units)] * num_fillers]

    def share_of(self, number: int, of: int, *, together: int | Sequence[int] = 1) -> range:
        """The sequences of share 0, 1, ...: neighbours, together about as long as those of each other share."""
        return shares(groups(self.num_sequences, together), self.lengths, of)[number]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self.lengths)]

    @cached_property
    def _response_starts(self) -> list[int]:
        return [0, *accumulate(self.response_lengths)]

    @cached_property
    def _prefixes(self) -> tuple[int, ...]:
        return self.prefix_lengths or (0,) * len(self.lengths)

    @cached_property
    def _wholes(self) -> list[int]:
        return wholes_of(self._prefixes)

    def _rows(self, indices: Sequence[int], seen: Sequence[int]) -> Tensor:
        """The rows of sequences, each after those of as many tokens of its prefix as `seen` says."""
        before = [(self._starts[self._wholes[i]], n) for i, n in zip(indices, seen, strict=True)]
        own = [(self._starts[i], self.lengths[i]) for i in indices]
        return _ranges([piece for both in zip(before, own, strict=True) for piece in both]).to(self.tokens.device)

    def _filler(self, units: Sequence[range]) -> Packed:
        filler = self.select(units[0] if units else range(0))
        return dataclasses.replace(
            filler,
            response_rows=filler.response_rows[:0],
            predictors=filler.predictors[:0],
            cu_responses=torch.zeros_like(filler.cu_responses),
            response_lengths=(0,) * filler.num_sequences,
            fields={name: values[:0] for name, values in filler.fields.items()},
        )

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a transformers model on our attention (see attention.py)."""
        longest, longest_seen = max(self.lengths, default=0), max(self.full_lengths, default=0)
        inputs: dict[str, Any] = {
            "input_ids": self.tokens[None],
            "position_ids": self.position_ids[None],
            "attention_mask": None,
            "use_cache": False,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
        }
        if self.prefix_lengths:
            inputs["key_rows"] = self._rows(range(self.num_sequences), self._prefixes)
            inputs["cu_seq_lens_k"] = _cumulate(self.full_lengths).to(self.tokens.device)
        if self.tokens.is_cuda:
            # a few distinct values only, and no host lists, so that compiled models are not compiled again
            longest, longest_seen = (1 << max(length - 1, 0).bit_length() for length in (longest, longest_seen))
        else:
            inputs["sequence_lengths"] = self.lengths
            if self.prefix_lengths:
                inputs["prefix_lengths"] = self.prefix_lengths
        return {**inputs, "max_length_q": longest, "max_length_k": longest_seen}


def pack(
    sequences: Sequence[Sequence[int]],
    response_masks: Sequence[Sequence[bool]] | None = None,
    *,
    prompt_lengths: Sequence[int] | None = None,
    prefix_lengths: Sequence[int] = (),
    device: torch.device | str = "cpu",
) -> Packed:
    """Returns the pack of token sequences.

    sequences: token ids of each sequence, none empty
    response_masks: for each sequence a flag a token, True where it is a response token; or
    prompt_lengths: the number of tokens before the response of each sequence. Without either, no token is one.
    prefix_lengths: see Packed

    Raises: ValueError for an empty sequence, masks of another length, a response token at the first place (nothing
    predicts it), or prefixes that are not there."""
    lengths = tuple(len(s) for s in sequences)
    if 0 in lengths:
        raise ValueError(f"pack: sequence {lengths.index(0)} is empty")
    if response_masks is not None and prompt_lengths is not None:
        raise ValueError("pack: give response_masks or prompt_lengths, not both")
    if prompt_lengths is not None:
        fits = len(prompt_lengths) == len(lengths)
        if not fits or any(not 0 <= p <= n for p, n in zip(prompt_lengths, lengths, strict=True)):
            raise ValueError(f"pack: prompt_lengths {list(prompt_lengths)} do not fit lengths {list(lengths)}")
        response_masks = [[False] * p + [True] * (n - p) for p, n in zip(prompt_lengths, lengths, strict=True)]
    if response_masks is None:
        response_masks = [[False] * n for n in lengths]
    if tuple(len(m) for m in response_masks) != lengths:
        raise ValueError("pack: each response mask must have one flag a token of its sequence")
    prefixes = _checked_prefixes(prefix_lengths, lengths)
    for n, mask in enumerate(response_masks):
        if mask[0] and not (prefixes and prefixes[n]):
            raise ValueError(f"pack: the first token of sequence {n} is a response token, but nothing predicts it")
    flags = torch.tensor([flag for mask in response_masks for flag in mask], dtype=torch.bool)
    tokens = _integers([t for s in sequences for t in s])
    response_lengths = tuple(sum(map(bool, mask)) for mask in response_masks)
    rows = flags.nonzero()[:, 0].to(device)
    return _packed(tokens.to(device), rows, lengths, response_lengths, prefixes or (0,) * len(lengths), {})


def _packed(
    tokens: Tensor,
    response_rows: Tensor,
    lengths: tuple[int, ...],
    response_lengths: tuple[int, ...],
    prefixes: Sequence[int],
    fields: dict[str, Tensor],
) -> Packed:
    """What follows from these, put together."""
    starts, before = [0, *accumulate(lengths)], torch.arange(-1, len(tokens) - 1)
    for start, whole, prefix in zip(starts, wholes_of(prefixes), prefixes, strict=False):
        if prefix:
            before[start] = starts[whole] + prefix - 1
    return Packed(
        tokens=tokens,
        position_ids=_ranges(list(zip(prefixes, lengths, strict=True))).to(tokens.device),
        cu_seqlens=_cumulate(lengths).to(tokens.device),
        response_rows=response_rows,
        predictors=before.to(tokens.device)[response_rows],
        cu_responses=_cumulate(response_lengths).to(tokens.device),
        lengths=lengths,
        response_lengths=response_lengths,
        prefix_lengths=tuple(prefixes) if any(prefixes) else (),
        fields=fields,
    )


def _checked_prefixes(prefixes: Sequence[int], lengths: Sequence[int]) -> tuple[int, ...]:
    if not any(prefixes):
        return ()
    room, fits = 0, len(prefixes) == len(lengths)  # room: tokens to go on from: those of the last one, or that it saw
    for prefix, length in zip(prefixes, lengths, strict=False):
        fits = fits and (prefix == 0 or 0 < prefix <= room)
        room = prefix or length
    if not fits:
        raise ValueError(f"pack: prefix_lengths {list(prefixes)} do not fit lengths {list(lengths)}")
    return tuple(prefixes)


def _integers(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _cumulate(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _ranges(pieces: Sequence[tuple[int, int]]) -> Tensor:
    """The numbers start, start + 1, ... of each (start, length), end to end, int64."""
    starts, lengths = _integers(pieces).view(len(pieces), 2).unbind(1)
    ends = lengths.cumsum(0)
    return torch.arange(int(lengths.sum())) + (starts - ends + lengths).repeat_interleave(lengths)
