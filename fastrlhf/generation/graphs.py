"""Decode steps as CUDA graphs: the host takes longer to launch a step's many small kernels than a GPU to run them.

A graph replays kernels at fixed addresses and shapes. So a step's inputs are copied to a buffer that stays, and rows
are padded to one of a few sizes, a graph each, captured when it is first needed. What pads is a token at the start of a
free slot, which nobody reads. Graphs are captured again when the cache or the weights have moved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


class Graphs:
    """Calls `forward` through graphs of it. forward: (2, n) int64, tokens and places, to logits (n, V).

    record: makes of a function without arguments one that does its work again, and the tensor that it leaves it in
    max_rows: most rows of a call"""

    def __init__(self, forward: Forward, record: Record, *, max_rows: int, device: torch.device) -> None:
        self.forward, self.record = forward, record
        self.inputs = torch.zeros(2, max_rows, dtype=torch.int64, device=device)
        self.captured: dict[int, tuple[Callable[[], object], Tensor]] = {}
        self.addresses: Any = None
        self.broken = False  # capture failed once: from then on steps are plain calls

    def clear(self) -> None:
        """Forgets the graphs, and the memory that they hold."""
        self.captured.clear()

    def __call__(self, inputs: Tensor, *, num_slots: int, addresses: object) -> Tensor:
        """forward(inputs), which lie on the host; the result is good until the next call.

        num_slots: slots that rows may be padded to
        addresses: of all that graphs read besides their inputs; other ones than before make them void"""
        num_rows = inputs.shape[1]
        size = padded_size(num_rows, num_slots)
        if addresses != self.addresses:
            self.clear()
            self.addresses = addresses
        held = self.inputs[:, :size]
        held.copy_(torch.nn.functional.pad(inputs, (0, size - num_rows)))
        if size not in self.captured and not self.broken:
            self._capture(size)
        if self.broken:
            return self.forward(held[:, :num_rows])
        replay, logits = self.captured[size]
        replay()
        return logits[:num_rows]

    def _capture(self, size: int) -> None:
        """A graph of `size` rows, tried against a plain call on the inputs that are there."""
        held = self.inputs[:, :size]
        expected, why = self.forward(held), ""
        try:
            replay, logits = self.record(lambda: self.forward(held))
            replay()
            # padding and capture may choose other matrix products, which round differently
            if (logits - expected).abs().max() > 0.05 * expected.abs().max():
                why = "a replayed step gives other logits than a plain one"
            self.captured[size] = replay, logits
        except RuntimeError as error:  # what a graph cannot hold, such as a wait for the device
            why = str(error).partition("\n")[0]
        if why:
            self.broken = True
            self.clear()
            warnings.warn(f"Engine: no CUDA graphs of this model, which makes decoding slower: {why}", stacklevel=2)


def padded_size(num_rows: int, num_slots: int) -> int:
    """The next power of two, or all slots."""
    return min(num_slots, 1 << (num_rows - 1).bit_length())


def recorder(device: torch.device) -> Record | None:
    """What records on this device, if anything."""
    return _CudaRecorder() if device.type == "cuda" else None


class _CudaRecorder:
    """Records into CUDA graphs, which share their memory: only the last result is wanted."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # other threads, such as that of a progress bar, may use the GPU meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result
