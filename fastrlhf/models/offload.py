"""What does not act rests in the memory of the CPU: models without gradients, and moments of optimizers.

`rest(holder, device)` sends it there; whoever uses it does so within `awake(holder)`, which brings it to the device for
that time. Of what never rests `onloaded` is nothing. Values travel as they are, so results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastrlhf.errors import UserError
from fastrlhf.runtime.optim import Optimizer

Holder = nn.Module | Optimizer
_RESTING: WeakKeyDictionary[Any, torch.device] = WeakKeyDictionary()


def check_offload(offload: str, device: torch.device) -> None:
    """Raises ValueError where offload=idle would do nothing."""
    if offload == "idle" and device.type == "cpu":
        raise UserError("offload=idle frees the memory of a GPU, but this run is on the CPU, where all rests already")


def offload(holder: Holder, device: torch.device) -> None:
    """Lets a model or the moments of an optimizer rest, and act on a device."""
    for tensor in _tensors(holder):
        tensor.data = to_host(tensor.data)
    _RESTING[holder] = device


@contextmanager
def onloaded(*holders: Holder | None) -> Iterator[None]:
    """Those of the holders that rest are on their device meanwhile."""
    with ExitStack() as stack:
        for holder in holders:
            if holder is not None and holder in _RESTING:
                stack.enter_context(_awake(holder, _RESTING[holder]))
        yield


@contextmanager
def _awake(holder: Holder, device: torch.device) -> Iterator[None]:
    del _RESTING[holder]  # within itself it is awake
    copies: dict[int, tuple[Tensor, int]] = {}
    for tensor in _tensors(holder):
        copies[id(tensor)] = tensor.data, tensor._version
        tensor.data = to_device(tensor.data, device)
    try:
        yield
    finally:
        for tensor in _tensors(holder):
            copy, version = copies.get(id(tensor), (tensor, None))
            # moments are new, or changed by a fused step, which leaves the version as it was
            changed = isinstance(holder, Optimizer) or tensor._version != version
            tensor.data = to_host(tensor.data) if changed else copy
        _RESTING[holder] = device


def to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory of the CPU, from which a GPU reads fastest."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, which work that is queued there later finds complete."""
    return tensor.to(device, non_blocking=True)


def _tensors(holder: Holder) -> list[Tensor]:
    if isinstance(holder, nn.Module):
        return [*holder.parameters(), *holder.buffers()]
    return [each for state in holder.adam.state.values() for each in state.values() if isinstance(each, Tensor)]
