"""Models whose parameters, gradients and optimizer state are cut into shards, one a process: PyTorch's FSDP2.

A sharded model is called as before, by all processes alike: each layer is put together for the time that it computes.
Generation cannot do that, since processes end after different numbers of tokens; it and saving run a twin, a copy of
the model that has all weights while `unsharded` is open and none before and after.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from fastrlhf.runtime import distributed

M = TypeVar("M", bound=nn.Module)
_TWINS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def shard(model: nn.Module) -> None:
    """Cuts a model into shards, each layer by itself. Gradients are summed over the processes, not averaged."""
    instead: dict[int, Any] = {id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in model.parameters()}
    for module in model.modules():  # the twin has the same settings, whoever changes them
        settings = (getattr(module, name, None) for name in ("config", "generation_config"))
        instead |= {id(each): each for each in settings if each is not None}
    _TWINS[model] = copy.deepcopy(model, instead)
    mesh = _mesh(next(model.parameters()).device.type)
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)  # or the last would stay whole after a forward
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def unsharded_replica(model: M) -> M:
    """The model itself, or of a sharded one the twin."""
    return _TWINS.get(model, model)  # type: ignore[return-value]


@contextmanager
def unsharded(model: M) -> Iterator[M]:
    """Yields `unsharded_replica(model)`, which has all weights meanwhile. All processes open this together."""
    whole = unsharded_replica(model)
    pairs = [] if whole is model else list(zip(whole.parameters(), model.parameters(), strict=True))
    for ours, theirs in pairs:
        ours.data = gathered(theirs.detach())
    try:
        yield whole
    finally:
        for ours, _ in pairs:
            ours.data = ours.data.new_empty(0)


def gathered(values: Any) -> Any:
    """The values with whole tensors in the place of sharded ones; all processes call this together."""
    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor(), values)


def scattered(values: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The state of a parameter, cut as the parameter is if that is sharded; all processes have the same whole state."""
    if not isinstance(parameter, DTensor):
        return values
    mesh, placements = parameter.device_mesh, parameter.placements

    def cut(value: Tensor) -> Tensor:
        if value.shape != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)

    return tree_map_only(Tensor, cut, values)


@cache
def _mesh(device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (distributed.world_size(),))
