"""Prompts that are read once for all the responses to them, where that leaves a model's output as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrlhf.models.offload import onloaded
from fastrlhf.models.policy import PackedModel
from fastrlhf.packing import Packed, pack
from fastrlhf.runtime import distributed


def pack_responses(
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    share_prompts: bool,
    as_responses: bool = True,
    device: torch.device | str,
) -> Packed:
    """Returns the pack of each prompt with its response; with share_prompts, a prompt that neighbours have in common is
    there once.

    as_responses: whether the tokens of the responses are response tokens; but a first token that nothing predicts is
    none"""
    tokens: list[list[int]] = []
    prefixes: list[int] = []
    masks: list[list[bool]] = []
    before: list[int] | None = None
    for prompt, response in zip(prompts, responses, strict=True):
        seen = len(prompt) if share_prompts and prompt == before else 0
        own, before = prompt[seen:], prompt
        prefixes.append(seen)
        tokens.append(own + response)
        masks.append([False] * len(own) + [as_responses] * len(response))
        masks[-1][0] &= bool(prompt)
    return pack(tokens, masks, prefix_lengths=prefixes, device=device)


@torch.no_grad()
def can_share_prompts(model: PackedModel, device: torch.device) -> bool:
    """Whether reading a prompt once for two responses leaves a model's hidden states as they are, which is so where
    nothing but attention mixes tokens. Says so where it is not."""
    vocab = model.model.get_input_embeddings().num_embeddings  # which may be tiny
    prompt, *responses = ([n % vocab for n in numbers] for numbers in ((3, 1, 4, 1, 5, 6), (2, 7), (6, 5, 3)))

    def hidden(share_prompts: bool) -> Tensor:
        batch = pack_responses([prompt] * 2, responses, share_prompts=share_prompts, device=device)
        return model.hidden(batch, torch.cat([batch.predictors, batch.last_rows])).double()

    half = model.autocast is not None or model.model.dtype != torch.float32
    with onloaded(model):
        error = (hidden(True) - (apart := hidden(False))).norm() / apart.norm()
    if error <= (0.02 if half else 1e-4):
        return True
    name = type(model.model).__name__
    distributed.print_once(
        f"{name}: prompts are read with each response, because reading them once changes what follows"
    )
    return False
