"""Our ops in place of what transformers' layers compute in many small steps: norms, gated activations, rotations.

A module is taken over by giving it a subclass of its class with another `forward`: parameters, hooks and names stay,
and copies, checkpoints and adapters see the module that they know. It is taken over only if a stand-in, the module
with small random parts, computes the same either way, gradients included; what we do not know is left alone.

An attention layer keeps its forward, but for the function that it rotates queries and keys by. That is a name in its
file, which other models share, so the layer gets a copy of its forward in which the name means our function. Decorators
around a forward, such as those that rename an argument, stay around the copy. fast_paths.py says what was taken over.

Linear layers take our product for few rows: those of a decode step, on the CPU and without gradients.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf.ops.rms_norm import rms_norm
from fastrlhf.ops.rotary import rotary
from fastrlhf.ops.silu_mul import silu_mul
from fastrlhf.ops.thin_linear import MOST_AT_ONCE, thin_linear

FEWEST = 4  # rows; torch's products of a vector are as fast
MOST_BYTES = 2**19  # of the rows, which are read once for every few outputs: they have to stay in the cache
ROTATION = "apply_rotary_pos_emb"  # transformers' function, by which layers call it
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EPSILONS = ("variance_epsilon", "eps")  # what transformers' norms call it


class FusedLayer(nn.Module):
    """What the classes of modules that were taken over share."""


class _Norm(FusedLayer):
    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:  # autocast leaves it to promotion
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, eps=_epsilon(self))


class _GatedMLP(FusedLayer):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


def fuse_layers(model: nn.Module) -> None:
    """Takes over the norms, gated MLPs and rotations of a model, in place."""
    for module in model.modules():
        fused = None if isinstance(module, FusedLayer) else _taken_over(module)
        if fused is not None:
            module.__class__ = fused


def _taken_over(module: nn.Module) -> Any:
    """The class of a module that computes the same with our ops, or None."""
    original: Any = type(module)
    for kind, stand_in_of in ((_Norm, _norm_stand_in), (_GatedMLP, _mlp_stand_in)):
        made = stand_in_of(module)
        if made is not None and _agrees(_fused(kind, original), *made):
            return _fused(kind, original)
    return _rotating(original)


@functools.cache
def _fused(kind: Any, original: Any) -> Any:
    return subclass(kind, original)


def subclass(kind: Any, original: Any, **members: Any) -> Any:
    """Returns the class of a module that is taken over: the original under its own name, with the members of kind."""
    return type(original.__name__, (kind, original), {"__module__": original.__module__, **members})


@functools.cache
def _rotating(original: Any) -> Any:
    """An attention layer's class whose forward finds our function under the name of theirs, or None."""
    theirs = getattr(inspect.unwrap(original.forward), "__globals__", {}).get(ROTATION)
    ours = functools.partial(_rotate, theirs)
    if theirs is None or not _rotates_alike(ours, theirs):
        return None
    copied = _calling(ours, original.forward)
    return None if copied is None else subclass(FusedLayer, original, forward=copied)


def _calling(ours: Callable[..., Any], forward: Any) -> FunctionType | None:
    """A copy of a forward in which ROTATION is ours, within its decorators; None if it does not call that function, or
    a decorator does not hold what it decorates as a variable of its own."""
    if not isinstance(forward, FunctionType):
        return None
    names, cells, inner = forward.__globals__, forward.__closure__ or (), getattr(forward, "__wrapped__", None)
    if inner is None:
        return _copy(forward, {**names, ROTATION: ours}, cells) if ROTATION in forward.__code__.co_names else None
    copied = _calling(ours, inner)
    if copied is None or not any(_holds(cell, inner) for cell in cells):
        return None
    decorated = _copy(forward, names, tuple(CellType(copied) if _holds(cell, inner) else cell for cell in cells))
    decorated.__dict__["__wrapped__"] = copied
    return decorated


def _copy(function: FunctionType, names: dict[str, Any], cells: tuple[CellType, ...]) -> FunctionType:
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells or None)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    return copied


def _holds(cell: CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False


def _rotate(theirs: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **more: Any) -> Any:
    """Queries and keys (batch, heads, tokens, K) turned by angles of cos, sin (batch, tokens, K)."""
    alike = q.dtype == k.dtype == cos.dtype and k.shape[2:] == q.shape[2:] and cos.shape == (len(q), *q.shape[2:])
    if others or more or q.ndim != 4 or not alike:  # as under autocast, or where a part of a head is turned
        return theirs(q, k, cos, sin, *others, **more)
    batch, _, tokens, width = q.shape
    angles = [t.reshape(batch * tokens, width) for t in (cos, sin)]
    rows = [t.transpose(1, 2).reshape(batch * tokens, -1, width) for t in (q, k)]
    return tuple(rotary(t, *angles).view(batch, tokens, -1, width).transpose(1, 2) for t in rows)


def _rotates_alike(ours: Callable[..., Any], theirs: Callable[..., Any]) -> bool:
    q, k = (_random(2, heads, 5, 8, seed=heads) for heads in (4, 2))
    cos, sin = (_random(2, 5, 4, seed=seed).repeat(1, 1, 2) for seed in (5, 6))
    try:
        return all(is_close(a, b) for a, b in zip(ours(q, k, cos, sin), theirs(q, k, cos, sin), strict=True))
    except Exception:  # a function of other arguments
        return False


def _epsilon(norm: nn.Module) -> Any:
    return next((getattr(norm, name) for name in EPSILONS if isinstance(getattr(norm, name, None), float)), None)


def _norm_stand_in(module: nn.Module) -> tuple[nn.Module, Tensor] | None:
    """A norm with a random weight, and rows of different size for it; None for what is no such norm."""
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and not module._modules and not module._buffers
    if not alone or weight is None or weight.ndim != 1 or _epsilon(module) is None:
        return None
    width = weight.shape[0]
    made = _with(module, _parameters={"weight": nn.Parameter(_random(width, seed=1))})
    return made, _random(5, width, seed=2) * torch.tensor([[1e-4], [1e-2], [1.0], [30.0], [0.0]])


def _mlp_stand_in(module: nn.Module) -> tuple[nn.Module, Tensor] | None:
    """A gated MLP with small random projections, and rows for it; None for what is no such MLP."""
    if set(module._modules) - {"act_fn"} != set(PROJECTIONS) or module._parameters or module._buffers:
        return None
    layers = {}
    for seed, name in enumerate(PROJECTIONS):
        rows, columns = (8, 12) if name == "down_proj" else (12, 8)
        layers[name] = nn.Linear(columns, rows, bias=False)
        layers[name].weight = nn.Parameter(_random(rows, columns, seed=seed))
    return _with(module, _modules={**module._modules, **layers}), 2 * _random(5, 8, seed=7)


def _with(module: nn.Module, **parts: dict[str, Any]) -> nn.Module:
    """A shallow copy of a module with other parameters or children."""
    made = copy.copy(module)
    made.__dict__.update(parts)
    return made


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _agrees(fused: type, stand_in: nn.Module, rows: Tensor) -> bool:
    """Whether the stand-in gives the same for the rows, gradients included, before and after it is taken over."""
    try:
        theirs = _results(stand_in, rows)
        stand_in.__class__ = fused
        ours = _results(stand_in, rows)
    except Exception:  # a forward that wants what the stand-in has not, in whatever way it says so
        return False
    return all(is_close(a, b) for a, b in zip(ours, theirs, strict=True))


def _results(module: nn.Module, rows: Tensor) -> Sequence[Tensor]:
    leaves = [rows.clone().requires_grad_(), *module.parameters()]
    with torch.enable_grad():
        output = module.forward(leaves[0])  # past hooks
        grads = torch.autograd.grad(output, leaves, _random(*output.shape, seed=9))
    return output, *grads


def is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max())


class ThinLinear(nn.Linear):
    """nn.Linear in all but the time that it takes."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        plain = type(input) is Tensor and type(weight) is nn.Parameter and input.is_cpu and weight.is_cpu
        if not plain or torch.is_grad_enabled() or not (input.dtype is weight.dtype is torch.float32):
            return super().forward(input)
        num_rows, fits = input.numel() // self.in_features, 4 * input.numel() <= MOST_BYTES
        if not (FEWEST <= num_rows <= MOST_AT_ONCE and fits) or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        out = thin_linear(input.reshape(num_rows, self.in_features), weight)
        if self.bias is not None:
            out += self.bias
        return out.view(*input.shape[:-1], self.out_features)


def thin_layers(model: nn.Module) -> None:
    """Makes every plain linear layer of a model a ThinLinear, in place; parameters, names and hooks stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ThinLinear
