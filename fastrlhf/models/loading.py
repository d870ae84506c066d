"""Loading of transformers models onto our attention, refusing what would silently be wrong.

Every loaded model is tried once: what we compute from a pack of two sequences must be what the model itself, on the
attention it came with, computes from each alone. That finds layers that mix the sequences of a pack, attention that is
not plain causal attention, and heads that scale their logits in a way that we do not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from fastrlhf.data.objects import ModelSource
from fastrlhf.data.pretrained import read_pretrained
from fastrlhf.errors import UserError
from fastrlhf.models.attention import ATTENTION
from fastrlhf.models.fused_layers import fuse_layers, thin_layers
from fastrlhf.models.heads import head_logprobs, head_scores, hidden_states, offsets_of
from fastrlhf.models.last_layer import trim_last_layer
from fastrlhf.models.lora import recompute
from fastrlhf.packing import Packed, pack

PROBE_LENGTHS = (5, 9)
NO_HEAD = "reward model: {} has no trained score head; `fastrlhf reward` trains one on its body"


def load_causal_lm(
    path: str | Path | PreTrainedModel,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    freeze: bool = False,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Returns a causal language model on our attention, in eval mode, without dropout.

    path: a folder, a hub id, or a model, which is changed in place
    dtype: of all parameters
    freeze: whether its parameters ask for no gradient
    gradient_checkpointing: recompute activations in the backward pass; takes effect in train()

    Raises: FileNotFoundError for a folder that is not there; ValueError for a folder without all the weights, or a
    model that does not compute packed what it computes unpacked."""
    model = path if isinstance(path, PreTrainedModel) else _load(AutoModelForCausalLM, path, dtype)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__}: its head is {type(head).__name__}, expected a linear layer")

    def alone(tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
        rows = logits.log_softmax(-1)
        entropy = -(rows.exp() * rows).sum(-1)
        return torch.cat([rows.gather(1, tokens[1:, None])[:, 0], entropy])

    def packed(batch: Packed) -> Tensor:
        hidden = hidden_states(model, batch, batch.predictors)
        logprobs, entropy = head_logprobs(model, hidden, batch.targets, return_entropy=True)
        parts = zip(logprobs.split(batch.response_lengths), entropy.split(batch.response_lengths), strict=True)
        return torch.cat([part for pair in parts for part in pair])

    return attach(
        model, alone, packed, dtype=dtype, device=device, freeze=freeze, gradient_checkpointing=gradient_checkpointing
    )


def load_scalar(
    path: ModelSource,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    freeze: bool = False,
    gradient_checkpointing: bool = False,
    head: str | None = None,
    heads: Sequence[str] = (),
    new_head: bool = False,
    head_init: str = "normal",
) -> PreTrainedModel:
    """Returns a classification model on our attention, in eval mode, without dropout; each label is a head of scores.

    path: a folder or hub id of such a model
    head: the name of a head to read, if there are several: the model that is returned has it alone
    heads: the names of all heads that the model must have, in order; without it and `head` it must have one
    new_head: take a causal language model too, whose body then gets these heads (or one). head_init: their weights:
        normal, N(0, 1 / (D + 1)) from torch's generator (Stiennon et al., arXiv 2009.01325), or zero

    Raises: as `load_causal_lm`, and ValueError for other heads, or for no head without new_head."""
    trained = heads_in(path)
    if trained:
        check_heads(f"reward model: {path}", trained, head, heads)
        model = _load(AutoModelForSequenceClassification, path, dtype)
        if head is not None:
            model = only_head(model, head)
    elif not new_head:
        raise UserError(NO_HEAD.format(path))
    else:
        model = classifier(_load(AutoModelForCausalLM, path, dtype).base_model, heads=heads)
        if head_init == "normal":
            nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    return attach_scalar(
        model, dtype=dtype, device=device, freeze=freeze, gradient_checkpointing=gradient_checkpointing
    )


def heads_in(path: ModelSource) -> tuple[str, ...]:
    """The names of the heads of the model in a folder or of a hub id; none of one that is no classification model.

    Raises: as `read_pretrained`."""
    config = read_pretrained(AutoConfig, path)
    return heads_of(config) if (config.architectures or [""])[0].endswith("ForSequenceClassification") else ()


def heads_of(config: Any) -> tuple[str, ...]:
    """The names of the heads of a classification model, in order."""
    return tuple(config.id2label[n] for n in range(config.num_labels))


def check_heads(what: str, names: Sequence[str], head: str | None, heads: Sequence[str]) -> None:
    """Raises ValueError unless heads of these names are what is asked for (see load_scalar)."""
    there = f"its heads are {', '.join(names)}"
    if head is not None and head not in names:
        raise UserError(f"{what} has no head {head!r}; {there}")
    if heads and tuple(heads) != tuple(names):
        raise UserError(f"{what} must have the heads {', '.join(heads)}, in this order; {there}")
    if head is None and not heads and len(names) != 1:
        raise UserError(f"{what} must have 1 label, got {len(names)}; or name one: {there}")


def only_head(model: PreTrainedModel, head: str) -> PreTrainedModel:
    """Returns a classification model of one of the heads of a model, whose body it takes."""
    number = heads_of(model.config).index(head)
    weight, bias = model.score.weight[number : number + 1].detach(), offsets_of(model)[number]
    alone = classifier(model.base_model, model.config, heads=[head])
    alone.score.weight.data.copy_(weight)
    alone.config.reward_bias = bias
    return alone


def classifier(body: PreTrainedModel, config: Any = None, *, heads: Sequence[str] = ()) -> PreTrainedModel:
    """Returns a classification model around a body, not copied; the weights of its heads, or of its one head, are 0.

    config: its own, if the body has other owners; default: that of the body. Changed

    Raises: ValueError when transformers has no such class for the body."""
    config = body.config if config is None else config
    config.num_labels = max(len(heads), 1)
    if heads:
        config.id2label, config.label2id = dict(enumerate(heads)), {name: n for n, name in enumerate(heads)}
    if config.pad_token_id in _as_set(config.eos_token_id):
        # transformers reads the score at the last token that is no padding: it must not take the end for padding
        config.pad_token_id = None
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(f"reward model: transformers has none with a {config.model_type} body") from error
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{type(model).__name__}: expected a linear head named score")
    setattr(model, model.base_model_prefix, body)
    weight = next(body.parameters())
    model.score = nn.Linear(
        model.score.in_features, config.num_labels, bias=False, device=weight.device, dtype=weight.dtype
    )
    nn.init.zeros_(model.score.weight)
    return model


def attach_scalar(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Returns the classification model on our attention; the options are those of `attach`."""
    offsets = torch.tensor(offsets_of(model))

    def alone(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens[None], use_cache=False).logits[0].float() + offsets.to(tokens.device)

    def packed(batch: Packed) -> Tensor:
        return head_scores(model, hidden_states(model, batch, batch.last_rows)).flatten()

    return attach(model, alone, packed, **options)


def attach(
    model: PreTrainedModel,
    alone: Callable[[Tensor], Tensor],
    packed: Callable[[Packed], Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    freeze: bool = False,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Puts a model on our attention, without dropout, its parameters in fresh memory, and tries it.

    alone(tokens) is what the model computes from one sequence, packed(batch) what we compute from a pack of several"""
    model = model.to(device=device, dtype=dtype).eval()
    _remove_dropout(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            # nothing here is padding; with it a token that also serves as padding elsewhere (eos) would not be trained
            module.padding_idx = None
    for parameter in model.parameters():
        # a file is mapped at any alignment, and matrix libraries choose their code by it: a resumed run would
        # differ from an uninterrupted one in the last bit
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    tokens = _probe_tokens(model)
    with torch.no_grad():
        if model.config._attn_implementation != ATTENTION:
            expected = torch.cat([alone(t) for t in tokens])
            model.set_attn_implementation(ATTENTION)
        else:
            expected = torch.cat([packed(_pack([t])) for t in tokens])
        fuse_layers(model)
        thin_layers(model)
        _check_attention(model, tokens[0])
        trim_last_layer(model, _pack(tokens))
        _compare(model, packed(_pack(tokens)), expected, dtype)
    model.requires_grad_(not freeze)
    if gradient_checkpointing:  # frozen too: an adapter may be trained on it
        # transformers 5.23 renamed it and warns of the old name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": recompute})
    return model


def _load(auto: Any, path: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """from_pretrained that refuses to make up weights that the folder lacks."""
    model, info = read_pretrained(auto, path, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise UserError(f"model: {path} lacks the weights {sorted(info['missing_keys'])} of {type(model).__name__}")
    return model


def _remove_dropout(model: PreTrainedModel) -> None:
    """Sets every dropout to 0: with it the ratio of the first minibatch would not be 1. eval() would not do, since
    gradient checkpointing works in train() only."""
    for holder in (*model.modules(), *(m.config for m in model.modules() if isinstance(m, PreTrainedModel))):
        for name, value in list(vars(holder).items()):
            if "drop" in name and isinstance(value, float):
                setattr(holder, name, 0.0)
        if isinstance(holder, _DropoutNd):
            holder.p = 0.0


def _as_set(ids: int | list[int] | None) -> set[int]:
    return set(ids) if isinstance(ids, list) else set() if ids is None else {ids}


def _probe_tokens(model: PreTrainedModel) -> list[Tensor]:
    """Two sequences without the padding token."""
    config, device = model.config.get_text_config(), next(model.parameters()).device
    pad, vocab = config.pad_token_id, config.vocab_size
    ids = [(7919 * i + 13) % vocab for i in range(sum(PROBE_LENGTHS) + 1)]
    ids = [i for i in ids if i != pad] + [(pad or 0) + 1] * len(ids)
    return list(torch.tensor(ids[: sum(PROBE_LENGTHS)], device=device).split(PROBE_LENGTHS))


def _pack(sequences: list[Tensor]) -> Packed:
    return pack([s.tolist() for s in sequences], prompt_lengths=[1] * len(sequences), device=sequences[0].device)


def _check_attention(model: PreTrainedModel, tokens: Tensor) -> None:
    """Our attention refuses a call without a pack, so a model that accepts one is not on it."""
    try:
        model.base_model(input_ids=tokens[None], use_cache=False)
    except ValueError as error:
        if "fastrlhf attention" in str(error):
            return
        raise
    raise UserError(
        f"{type(model).__name__} is not on transformers' attention interface, so it cannot run packed; use a model "
        "whose attention can be replaced (Llama, Qwen2, Qwen3, Mistral, GPT-NeoX, GPT2, Gemma3 and most recent ones)"
    )


def _compare(model: PreTrainedModel, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    error = ((ours - theirs).abs() / (1 + theirs.abs())).mean().item()
    if not error <= (1e-3 if dtype in (torch.float32, torch.float64) else 0.1):
        raise UserError(
            f"{type(model).__name__}: packed it computes something else than by itself (mean error {error:.2e} of its "
            "outputs): its attention is not plain causal attention, or its head is not linear, scaled and soft-capped "
            "in a way known here; training it would be wrong"
        )
