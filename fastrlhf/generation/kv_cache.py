"""The engine's cache of keys and values: one slot a sequence, filled by packed prefill, read by one-token decode.

Row n of a decode step lives in slot n, so slots in use are always the first ones: a freed slot is refilled by moving
the last row into it. The cache is what the attention function (attention.py) finds under the keyword `slots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrlhf.models.attention import attend
from fastrlhf.ops.decode_attention import decode_attention
from fastrlhf.packing import Packed

PACK_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "sequence_lengths")  # of attention


@dataclass(frozen=True)
class CachePlan:
    """The most memory that the cache of a rollout takes."""

    num_slots: int
    max_length: int
    bytes_per_token: int

    @property
    def num_bytes(self) -> int:
        return self.num_slots * self.max_length * self.bytes_per_token

    def __str__(self) -> str:
        sizes = f"{self.num_slots} slots x {self.max_length:,} tokens x {self.bytes_per_token:,} bytes"
        return f"KV cache: {sizes} = {self.num_bytes / 2**20:,.1f} MiB at most"


class KVCache:
    """Keys and values of every layer, each (num_slots, kv heads, length, K), allocated when first written.

    The length is a power of two above that of the longest sequence so far, up to max_length: few responses are as long
    as they may be. Layers may differ in heads, width and window. A forward pass is announced by `prefill` or `decode`.
    """

    def __init__(self) -> None:
        self.num_slots = 0
        self.max_length = 0
        self._length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._packed: dict[str, Any] | None = None
        self._rows = self._places = self._lengths = torch.empty(0, dtype=torch.int64)
        self.version = 0  # changes when the memory does

    def reserve(self, num_slots: int, max_length: int) -> None:
        """Empties the slots, which may then hold num_slots sequences of max_length tokens.

        Memory that is large enough is kept."""
        if num_slots > self.num_slots or max_length > self.max_length:
            self.num_slots, self.max_length, self._length = num_slots, max_length, 0
            self._layers.clear()
            self.version += 1

    @property
    def num_bytes(self) -> int:
        """The memory held."""
        return sum(cache.nbytes for layer in self._layers.values() for cache in layer)

    def prefill(self, batch: Packed, slots: Sequence[int]) -> None:
        """Announces a packed forward pass: sequence i of `batch` fills slot slots[i]."""
        self.grow(max(batch.lengths))
        lengths = batch.cu_seqlens.diff().long()
        rows = torch.tensor(slots, device=lengths.device)
        self._rows = rows.repeat_interleave(lengths, output_size=batch.num_tokens)
        self._places = batch.position_ids
        inputs = batch.model_inputs()
        self._packed = {name: inputs.get(name) for name in PACK_KEYWORDS}

    def decode(self, places: Tensor) -> None:
        """Announces a forward pass of one new token in each of the first slots, for which `grow` made room.

        places: (N,) int64, that of the new token in its sequence. Runs on the device, without waiting for it"""
        self._packed = None
        self._rows = torch.arange(len(places), device=places.device)
        self._places = places
        self._lengths = (places + 1).to(torch.int32)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None
    ) -> tuple[Tensor, None]:
        """Caches the new keys and values and returns the attention output (batch, tokens, heads, K), and None.

        query, key, value: (batch, heads, tokens, K), one pack (1, H, T, K) or one token a row (N, H, 1, K)."""
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves normalised ones in float32
        keys, values = self._layer(module.layer_idx, key, value)
        keys[self._rows, :, self._places] = key.transpose(1, 2).flatten(0, 1)
        values[self._rows, :, self._places] = value.transpose(1, 2).flatten(0, 1)
        if self._packed is not None:
            return attend(module, query, key, value, None, scaling, sliding_window=sliding_window, **self._packed)
        out = decode_attention(query[:, :, 0], keys, values, self._lengths, scale=scaling, window=sliding_window)
        return out[:, None], None

    def copy(self, pairs: Sequence[tuple[int, int]], length: int) -> None:
        """Copies the first `length` tokens of slots to others; pairs: (from, to), no slot both."""
        if not pairs:
            return
        for layer in self._layers.values():
            sources, targets = torch.tensor(pairs, device=layer[0].device).unbind(1)
            for cache in layer:
                cache[targets, :, :length] = cache[sources, :, :length]

    def grow(self, length: int) -> None:
        """Makes room for sequences of `length` tokens, a layer at a time, so that only one is held twice."""
        if length <= self._length:
            return
        self._length = min(self.max_length, 1 << length.bit_length())
        self.version += 1
        for number, layer in self._layers.items():
            self._layers[number] = self._longer(layer[0]), self._longer(layer[1])

    def _longer(self, cache: Tensor) -> Tensor:
        longer = cache.new_empty(*cache.shape[:2], self._length, cache.shape[3])
        longer[:, :, : cache.shape[2]] = cache
        return longer

    def _layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found = self._layers.get(layer)
        if found is None or found[0].dtype != key.dtype or found[0].device != key.device:
            shapes = [(self.num_slots, t.shape[1], self._length, t.shape[3]) for t in (key, value)]
            found = self._layers[layer] = key.new_empty(shapes[0]), value.new_empty(shapes[1])
            self.version += 1
        return found
