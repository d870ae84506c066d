"""The last layer of a model, computed for the rows alone that are read after it.

Its keys and values are those of all rows; what follows its attention concerns a row by itself, and most rows, those of
prompts, are never read. The rows travel as a keyword of `model(...)`, so a layer that is recomputed in a backward pass
has them too. A layer is taken over as in fused_layers.py: only where it then computes the same, gradients included.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from fastrlhf.models.attention import gather
from fastrlhf.models.fused_layers import is_close, subclass
from fastrlhf.packing import Packed

READ = "rows_read"  # the keyword: (M,) int64, rows of the pack
CHILDREN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


class LastLayer(nn.Module):
    """What the classes of layers that were taken over share."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *others: Any, rows_read: Tensor | None = None, **options: Any) -> Any:
        if rows_read is None:
            return super().forward(hidden_states, *others, **options)
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attn(*others, hidden_states=normed, **options)[0]
        read = gather(hidden_states + attended, 1, rows_read)
        return read + self.mlp(self.post_attention_layernorm(read))


def trim_last_layer(model: PreTrainedModel, batch: Packed) -> None:
    """Takes over the last layer of a model on our attention, in place, if it computes the same from a pack."""
    layer = _last_layer(model.base_model)
    if layer is None or isinstance(layer, LastLayer) or set(layer._modules) != CHILDREN:
        return
    original: Any = type(layer)
    trimmed = _trimmed(original)
    if _agrees(trimmed, layer, model.base_model, batch):
        layer.__class__ = trimmed


def read_rows(body: PreTrainedModel, batch: Packed, rows: Tensor) -> Tensor:
    """Returns the last hidden states (M, D) of the given rows (M,) of a pack, after the final norm."""
    if isinstance(_last_layer(body), LastLayer):
        return body(**batch.model_inputs(), **{READ: rows}).last_hidden_state.squeeze(0)
    return gather(body(**batch.model_inputs()).last_hidden_state.squeeze(0), 0, rows)


def _last_layer(body: nn.Module) -> nn.Module | None:
    layers = body._modules.get("layers")
    return layers[-1] if isinstance(layers, nn.ModuleList) else None


@cache
def _trimmed(original: Any) -> Any:
    return subclass(LastLayer, original)


@torch.enable_grad()
def _agrees(trimmed: type, layer: nn.Module, body: PreTrainedModel, batch: Packed) -> bool:
    """Whether a float32 copy of the layer gives the same for some rows of a pack, before and after it is taken over."""
    calls: list[Any] = []
    hook = layer.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        body(**batch.model_inputs())
    hook.remove()
    ((hidden, *others), options) = tree_map_only(Tensor, _widened, calls[0])
    rows, made = batch.predictors[::3].repeat(2), copy.deepcopy(layer).float().requires_grad_()
    leaves = [hidden.requires_grad_(), *made.parameters()]
    try:
        theirs = made.forward(hidden, *others, **options)[:, rows]
        made.__class__ = trimmed
        ours = made.forward(hidden, *others, **options, **{READ: rows})
        upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0)).to(theirs)
        grads = zip(*(torch.autograd.grad(output, leaves, upstream) for output in (ours, theirs)), strict=True)
        return is_close(ours, theirs) and all(is_close(a, b) for a, b in grads)
    except Exception:  # a forward that is called otherwise, in whatever way it says so
        return False


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
