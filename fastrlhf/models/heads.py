"""What we compute on top of a transformers body: hidden states of a pack, log-probabilities, scalar scores."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.models.last_layer import read_rows
from fastrlhf.models.lora import Adapter, use_adapter
from fastrlhf.ops import linear_token_logprobs
from fastrlhf.packing import Packed

KEPT_ROWS = 512  # as many as are computed at a time


def hidden_states(
    model: PreTrainedModel,
    batch: Packed,
    rows: Tensor,
    autocast: torch.dtype | None = None,
    adapter: Adapter | None = None,
) -> Tensor:
    """Returns the last hidden states (M, D) of rows (M,) of a pack, after the final norm; the model must be on our
    attention.

    adapter: acts on the body, which otherwise computes without one"""
    with autocasting(batch.tokens.device, autocast), use_adapter(adapter):
        return read_rows(model.base_model, batch, rows)


def head_logprobs(
    model: PreTrainedModel,
    hidden: Tensor,
    targets: Tensor,
    *,
    op: Callable[..., Any] = linear_token_logprobs,
    **options: Any,
) -> Any:
    """Returns what an op on a linear head does with that of a causal language model, in the head's dtype.

    Of a float32 head the logits of KEPT_ROWS, or what is made of them, are kept for the backward pass, where they would
    be made again.

    hidden: (R, D), targets: (R,) int64; the options are those of the op"""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    if op is linear_token_logprobs and layer.weight.dtype == torch.float32:
        options = {"memory_budget": KEPT_ROWS * layer.weight.shape[0] * 4, **options}
    with torch.autocast(hidden.device.type, enabled=False):
        return op(
            hidden.to(layer.weight.dtype),
            layer.weight,
            targets,
            bias=layer.bias,
            logit_scale=scale,
            logit_softcap=getattr(config, "final_logit_softcapping", None),
            **options,
        )


def head_scores(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Returns the heads of a classification model, and their offsets, at hidden (M, D): (M, H) float32; (M,) of one."""
    weight, offsets = model.score.weight.float(), offsets_of(model)
    with torch.autocast(hidden.device.type, enabled=False):
        if len(weight) == 1:
            return hidden.float() @ weight[0] + offsets[0]
        return hidden.float() @ weight.t() + torch.tensor(offsets, device=hidden.device)


def offsets_of(model: PreTrainedModel) -> list[float]:
    """The offset of each head of a classification model: `reward_bias` in its config, a number or one for each."""
    given = getattr(model.config, "reward_bias", 0.0)
    return [float(x) for x in given] if isinstance(given, list) else [float(given)] * model.config.num_labels


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """torch.autocast to a dtype, or nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
