"""The head of a model in a folder of its weights, for readers whose head is not tied to the embeddings."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

HEAD, INDEX = "tied_head.safetensors", "model.safetensors.index.json"


def write_tied_head(model: PreTrainedModel, folder: Path) -> None:
    """Adds the head's weight, which transformers leaves out where it is that of the embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    (name,) = (f"{name}.weight" for name, module in model.named_modules() if module is head)
    save_file({name: head.weight.detach().cpu().clone()}, folder / HEAD)
    if (folder / INDEX).is_file():  # of several files servers read those in the index
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index["weight_map"][name] = HEAD
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
