"""Which of our fast paths a model takes: what fused_layers.py, last_layer.py and shared_prompts.py do.

None of them changes a result, so one that is not taken shows in the time alone. What is said here was seen: a small
pack goes through the model, and a layer counts as fused if our op was called in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from fastrlhf.models import fused_layers
from fastrlhf.models.fused_layers import ThinLinear
from fastrlhf.models.last_layer import LastLayer
from fastrlhf.models.loading import heads_in
from fastrlhf.models.policy import PackedModel, Policy, RewardModel, load_scalar
from fastrlhf.models.shared_prompts import pack_responses

# what is fused -> our op, by its name in fused_layers.py, and what the class of such a layer is named in transformers
FUSED = {"norms": ("rms_norm", "Norm"), "MLPs": ("silu_mul", "MLP"), "rotations": ("rotary", "Attention")}


@dataclass(frozen=True)
class FastPath:
    """taken, left: the layers that go by it and those that do not, each as a name and its class."""

    name: str
    taken: dict[str, str]
    left: dict[str, str]


def load_packed_model(path: str | Path, *, autocast: torch.dtype | None, device: torch.device) -> PackedModel:
    """Returns the model in a folder or of a hub id, frozen, as what it was saved as: a policy or a reward model."""
    heads = heads_in(path)
    if not heads:
        return Policy.from_pretrained(path, autocast=autocast, device=device, freeze=True)
    return RewardModel(load_scalar(path, heads=heads, device=device, freeze=True), autocast=autocast)


def fast_paths(role: PackedModel) -> Iterator[FastPath]:
    """Yields each path but that of shared prompts, which `can_share_prompts` tells."""
    model: PreTrainedModel = role.model
    modules, called = dict(model.named_modules()), _calls(role)
    for what, (op, kind) in FUSED.items():
        found = {name: module for name, module in modules.items() if kind in type(module).__name__}
        innermost = {n: module for n, module in found.items() if not any(other.startswith(f"{n}.") for other in found)}
        yield _path(f"fused {what}", innermost, called[op])
    linear: dict[str, nn.Module] = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    plain = role.autocast is None and model.device.type == "cpu" and model.dtype == torch.float32
    yield _path("thin products", linear, {m for m in linear.values() if plain and isinstance(m, ThinLinear)})
    last = [
        name for name in modules if name.rpartition(".")[2].isdigit() and sum(map(str.isdigit, name.split("."))) == 1
    ]
    yield _path(
        "trimmed", {n: modules[n] for n in last[-1:]}, {m for m in modules.values() if isinstance(m, LastLayer)}
    )


def _path(name: str, layers: dict[str, nn.Module], taken: set[nn.Module]) -> FastPath:
    classes = {layer: type(module).__name__.removeprefix("Thin") for layer, module in layers.items()}
    goes = {layer: kind for layer, kind in classes.items() if layers[layer] in taken}
    return FastPath(name, goes, {layer: kind for layer, kind in classes.items() if layer not in goes})


@torch.no_grad()
def _calls(role: PackedModel) -> dict[str, set[nn.Module]]:
    """op -> the layers in which it is called, by their own forward, for a pack of two responses."""
    called: dict[str, set[nn.Module]] = {op: set() for op, _ in FUSED.values()}
    device = next(role.model.parameters()).device
    batch = pack_responses([[1, 2, 3]] * 2, [[4, 5], [6]], share_prompts=False, device=device)
    with _watched(role.model, called):
        role.hidden(batch, batch.predictors)
    return called


@contextmanager
def _watched(model: nn.Module, called: dict[str, set[nn.Module]]) -> Iterator[None]:
    inside: list[nn.Module] = []
    originals = {op: getattr(fused_layers, op) for op in called}

    def recording(op: str) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            called[op].add(inside[-1])
            return originals[op](*args, **kwargs)

        return call

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda module, _: inside.append(module)))
        hooks.append(module.register_forward_hook(lambda *_: _left(inside), always_call=True))
    try:
        for op in called:
            setattr(fused_layers, op, recording(op))
        yield
    finally:
        for op, original in originals.items():
            setattr(fused_layers, op, original)
        for hook in hooks:
            hook.remove()


def _left(inside: list[nn.Module]) -> None:
    inside.pop()  # and returns None, as a hook does that leaves an output as it is
