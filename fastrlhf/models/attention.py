"""Attention over packed sequences, through unmodified transformers models.

Importing this module registers the attention function "fastrlhf" with transformers. It takes what a layer hands it and
one of two keywords that travelled through `model(...)`: the pack's cu_seqlens (`Packed.model_inputs`), or the slots of
the generation engine, which then do the attention over their cache.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from fastrlhf.errors import UserError
from fastrlhf.ops.packed_attention import packed_attention

ATTENTION = "fastrlhf"
# keywords of some models' attention that change its result: sinks, biases, sparse choices of keys
_UNSUPPORTED = ("s_aux", "sinks", "position_bias", "indices", "block_indices")
_VARLEN_TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.13 has it, 2.11 not


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    slots: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    sequence_lengths: Sequence[int] | None = None,
    prefix_lengths: Sequence[int] = (),
    key_rows: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Returns (output (1, T, H, K), None): causal attention of each sequence of the pack to its prefix and itself.

    query: (1, H, T, K); key, value: (1, Hkv, T, K), Hkv a divisor of H
    sliding_window: a token sees itself and the window - 1 tokens before it

    Raises: ValueError without cu_seq_lens_q or slots: padded input has no meaning here; for an unsupported keyword."""
    if dropout:
        raise UserError(f"fastrlhf attention: dropout must be 0, got {dropout}")
    if attention_mask is not None:
        raise UserError("fastrlhf attention: attention_mask must be None, lengths say what a token sees")
    for name in _UNSUPPORTED:
        if others.get(name) is not None:
            raise UserError(f"fastrlhf attention: {type(module).__name__} wants {name}, which is not supported")
    if slots is not None:
        if softcap is not None:
            raise UserError(f"fastrlhf attention: softcap must be None while generating, got {softcap}")
        return slots.attend(module, query, key, value, scaling, sliding_window)
    if cu_seq_lens_q is None or cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
        raise UserError("fastrlhf attention: call the model with **batch.model_inputs() of a Packed batch")
    if query.shape[0] != 1:
        raise UserError(f"fastrlhf attention: a pack is one row of tokens, got {query.shape[0]} rows")
    # under autocast rotary embeddings and norms leave queries and keys in float32
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.is_cpu and softcap is None and query.dtype in (torch.float32, torch.float64):
        q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
        prefixes = torch.tensor(prefix_lengths, dtype=torch.int32) if prefix_lengths else None
        options: dict[str, Any] = {"prefix_lengths": prefixes, "scale": scaling, "window": sliding_window}
        return packed_attention(q, k, v, cu_seq_lens_q, **options)[None], None
    if key_rows is not None:
        key, value = gather(key, 2, key_rows), gather(value, 2, key_rows)
    if query.is_cuda and softcap is None and query.dtype in (torch.bfloat16, torch.float16):
        bounds = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        return _varlen(query, key, value, scaling, sliding_window, bounds), None
    lengths = cu_seq_lens_q.diff().tolist() if sequence_lengths is None else list(sequence_lengths)
    key_lengths = lengths if key_rows is None else cu_seq_lens_k.diff().tolist()
    queries, keys, values = query.split(lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2)
    outputs = []
    for q, k, v in zip(queries, keys, values, strict=True):
        outputs.append(_one_sequence(q, k, v, scaling, sliding_window, softcap))
    return torch.cat(outputs, 2).transpose(1, 2), None


def gather(x: Tensor, dim: int, rows: Tensor) -> Tensor:
    """Returns x.index_select(dim, rows). Gradients of a row that is there several times are added in a fixed order,
    which torch has for index_select on the CPU and for indexing on GPUs."""
    return x[(slice(None),) * dim + (rows,)] if x.is_cuda else x.index_select(dim, rows)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    bounds: tuple[Tensor, Tensor, int, int],
) -> Tensor:
    """Where keys are more than queries, these are the last: the mask is aligned at the end of a sequence."""
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))  # (T, H, K)
    options: dict[str, Any] = {"scale": scaling, "window_size": (window - 1, 0) if window else (-1, 0)}
    if q.shape[1] != k.shape[1]:
        if _VARLEN_TAKES_GQA:
            options["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    output: Any = varlen_attn(q, k, v, *bounds, **options)
    return output[None]


def _one_sequence(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    length, grouped = k.shape[2], q.shape[1] != k.shape[1]
    past = length - q.shape[2]  # keys before those of the first query
    if softcap is not None:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        logits = softcap * torch.tanh(logits / softcap)
        hidden = ~causal_mask(length, window or length, q.device, past)
        return logits.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    cut = window and length > window
    mask = causal_mask(length, window or length, q.device, past) if cut or past else None
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


@functools.lru_cache(maxsize=64)
def causal_mask(length: int, window: int, device: torch.device, past: int = 0) -> Tensor:
    """(length - past, length) bool, True where the row's token, one of those from `past` on, sees the column's: at most
    window tokens, itself included."""
    distance = torch.arange(past, length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def _no_mask(*_: Any, attention_mask: Tensor | None = None, config: Any = None, **__: Any) -> None:
    """Makes no mask; refuses what one would be needed for."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UserError("fastrlhf attention takes packed sequences, not padding; pass attention_mask=None")
    if getattr(config, "attention_chunk_size", None) is not None:
        raise UserError(f"fastrlhf attention: {config.model_type} attends within chunks, which is not supported")


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, _no_mask)
