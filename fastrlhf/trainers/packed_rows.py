"""Rows with several responses to a prompt as packs: for reward models, DPO and KTO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar

from fastrlhf.data import Judged
from fastrlhf.models.shared_prompts import pack_responses
from fastrlhf.packing import Packed
from fastrlhf.runtime import distributed

T = TypeVar("T", bound=Judged)


def full_sequences(row: Judged) -> list[list[int]]:
    """The tokens of a row's prompt with each of its responses, the better of a pair first."""
    return [row.prompt + response for response in row.responses]


def pack_rows(rows: Sequence[Judged], **options: Any) -> Packed:
    """The pack of the conversations of each row in turn; options: see `pack_responses`."""
    prompts = [row.prompt for row in rows for _ in row.responses]
    return pack_responses(prompts, [response for row in rows for response in row.responses], **options)


def microbatches_with_rows(batch: Packed, rows: Sequence[T], max_tokens: int) -> Iterator[tuple[Packed, Sequence[T]]]:
    """Yields this process's micro-batches of what pack_rows made of rows, each with the rows that it is of; a filler
    is of none."""
    sizes = [len(row.responses) for row in rows]
    own, ends = batch.share_of(*distributed.rank_and_world_size(), together=sizes), [*accumulate(sizes)]
    start, stop = (sum(end <= edge for end in ends) for edge in (own.start, own.stop))
    for part in batch.microbatches(max_tokens, together=sizes, share=distributed.rank_and_world_size()):
        end, room = start, part.num_sequences
        while end < stop and room > 0:
            room -= sizes[end]
            end += 1
        yield part, rows[start:end]
        start = end
