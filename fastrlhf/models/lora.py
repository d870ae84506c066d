"""Low-rank adapters: several roles of a run, such as policy and value model, on one frozen body.

An adapted linear layer computes x W^T + scale (x A^T) B^T. Which adapter acts is an argument of each forward pass of
`Policy`, `RewardModel` and `ValueModel`; the layers ask for it, and layers that are recomputed in a backward pass get
the one of their forward (`recompute`), so that the roles of a body never disturb each other's gradients.

A folder of an adapter has the format of PEFT, which loads it onto the same body.

Source: Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrlhf.errors import MissingFileError, UserError
from fastrlhf.packing import pack

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
OURS = "fastrlhf"  # in the metadata of the weights: just one key, since safetensors writes several in any order
HEAD = "base_model.model.score.weight"

_acting: ContextVar[Any] = ContextVar("acting", default=None)


class use_adapter:
    """`with use_adapter(adapter):` adapted layers add this adapter's part; with None they are as they were."""

    def __init__(self, adapter: Adapter | _Recorder | None) -> None:
        self.adapter = adapter
        self.tokens: list[Token[Any]] = []

    def __enter__(self) -> None:
        self.tokens.append(_acting.set(self.adapter))

    def __exit__(self, *_: object) -> None:
        _acting.reset(self.tokens.pop())


def recompute() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What torch's checkpoint runs a layer in, and later its recomputation: under the adapter that acts now."""
    return nullcontext(), use_adapter(_acting.get())


class Adapter(nn.Module):
    """Factors A (rank, in) and B (out, rank), float32, of linear layers of a model's body; scale = alpha / rank.

    model: on our attention. Its layers get a hook; what it is and computes otherwise stays
    targets: names of layers, such as q_proj,v_proj; all: every linear layer of the body

    A is uniform in +-1 / sqrt(in), from torch's generator; B is 0, so that at first nothing is added.
    Raises: ValueError for targets that the body lacks, or that do not run as modules of their own."""

    def __init__(self, model: PreTrainedModel, *, rank: int, alpha: float, targets: str = "all") -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        self.prefix, self.base_name, self.base_hash = model.base_model_prefix, model.name_or_path, hash_of(model)
        linears, device = linears_of(model, targets), next(model.parameters()).device
        self.number = {name: n for n, name in enumerate(linears)}
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name, layer in linears.items():
            bound = 1 / math.sqrt(layer.in_features)
            self.down.append(torch.empty(rank, layer.in_features).uniform_(-bound, bound).to(device))
            self.up.append(torch.zeros(layer.out_features, rank, device=device))
            if not any(getattr(hook, "func", None) is _add for hook in layer._forward_hooks.values()):
                layer.register_forward_hook(partial(_add, name))
        _check_that_they_run(model, list(linears))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def is_zero(self) -> bool:
        """Whether it adds nothing."""
        return not any(bool(up.any()) for up in self.up)

    def add(self, name: str, x: Tensor, output: Tensor) -> Tensor | None:
        """Returns output (..., out) of a layer for x (..., in), with this adapter's part; None: this layer has none."""
        if name not in self.number:
            return None
        down, up = self.down[self.number[name]], self.up[self.number[name]]
        part = F.linear(x.flatten(0, -2), down)
        return torch.addmm(output.flatten(0, -2), part, up.t(), alpha=self.scale).view_as(output)

    @torch.no_grad()
    def weight(self, name: str) -> Tensor:
        """What it adds to a layer's weight, (out, in) float32; `name` as in the body."""
        n = self.number[name]
        return self.scale * (self.up[n] @ self.down[n])

    def save(self, folder: str | Path, *, head: Tensor | None = None, bias: float | list[float] = 0.0) -> None:
        """Writes a folder that PEFT loads. head (H, D) and bias: those of a model that scores; H is 1 as a rule."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {self._key(name, kind): factor for name in self.number for kind, factor in self._factors(name)}
        if head is not None:
            tensors[HEAD] = head
        metadata = {OURS: json.dumps({"base_hash": self.base_hash, "reward_bias": bias})}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / WEIGHTS, metadata=metadata)
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
            "base_model_name_or_path": self.base_name,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({name.rpartition(".")[2] for name in self.number}),
            "modules_to_save": None if head is None else ["score"],
            "inference_mode": True,
        }
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, model: PreTrainedModel) -> tuple[Adapter, Tensor | None, Any]:
        """Returns the adapter in a folder that `save` wrote, its head and its bias.

        Raises: FileNotFoundError for a folder without one; ValueError when it belongs to other weights."""
        folder = Path(folder)
        if metadata_of(folder).get("base_hash") != hash_of(model):
            raise UserError(f"adapter: {folder} was trained on other weights than those of {model.name_or_path}")
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        targets = ",".join(settings["target_modules"])
        adapter = cls(model, rank=settings["r"], alpha=settings["lora_alpha"], targets=targets)
        with safe_open(folder / WEIGHTS, framework="pt") as file, torch.no_grad():
            for name in adapter.number:
                for kind, factor in adapter._factors(name):
                    factor.copy_(file.get_tensor(adapter._key(name, kind)))
            head = file.get_tensor(HEAD) if HEAD in file.keys() else None  # noqa: SIM118
        return adapter, head, metadata_of(folder)["reward_bias"]

    def _factors(self, name: str) -> list[tuple[str, Tensor]]:
        n = self.number[name]
        return [("lora_A", self.down[n]), ("lora_B", self.up[n])]

    def _key(self, name: str, kind: str) -> str:
        return f"base_model.model.{self.prefix}.{name}.{kind}.weight"


def metadata_of(folder: str | Path) -> dict[str, Any]:
    """The hash of the body that the adapter in a folder belongs to, and its bias; nothing for one that is not ours.

    Raises: FileNotFoundError when there is no adapter."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise MissingFileError(f"adapter: no {path}")
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads((file.metadata() or {}).get(OURS, "{}"))
        return found


def hash_of(model: PreTrainedModel) -> str:
    """A hash of the weights of a model's frozen body, rounded to bfloat16: the same for float32 and bfloat16 copies."""
    body = model.base_model
    if not hasattr(body, "_weights_hash"):
        total = hashlib.sha256()
        for name, tensor in body.state_dict().items():
            rounded = tensor.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16)
            total.update(f"{name} {tuple(tensor.shape)}".encode())
            total.update(memoryview(rounded.flatten().numpy()))
        body._weights_hash = total.hexdigest()
    return body._weights_hash


def linears_of(model: PreTrainedModel, targets: str) -> dict[str, nn.Linear]:
    """The linear layers of a model's body that have a name of targets, or all of them."""
    found = {name: m for name, m in model.base_model.named_modules() if isinstance(m, nn.Linear)}
    names = sorted({name.rpartition(".")[2] for name in found})
    asked = names if targets == "all" else [name.strip() for name in targets.split(",")]
    if unknown := sorted(set(asked) - set(names)) or not names:
        there = f"its linear layers are called {', '.join(names)}" if names else "it has no linear layer of torch"
        raise UserError(f"lora_targets: {type(model.base_model).__name__} has no layers {unknown}; {there}")
    return {name: m for name, m in found.items() if name.rpartition(".")[2] in asked}


def merge_into(model: PreTrainedModel, adapter: Adapter) -> None:
    """Adds an adapter to the weights of a model whose body has the adapter's layers."""
    with torch.no_grad():
        for name in adapter.number:
            layer = model.base_model.get_submodule(name)
            layer.weight += adapter.weight(name).to(layer.weight)


def save_merged(model: PreTrainedModel, adapter: Adapter, folder: str | Path) -> None:
    """Writes the model with the adapter in its weights, float32, as a plain folder, which transformers loads.

    The weights are put together on the CPU; the model stays as it is."""
    copies: dict[int, Tensor] = {}  # by address, so that tied weights stay tied
    state = {}
    for name, tensor in model.state_dict().items():
        copied = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None, copy=True)
        state[name] = copies.setdefault(tensor.data_ptr(), copied)
    for name in adapter.number:
        state[f"{model.base_model_prefix}.{name}.weight"] += adapter.weight(name).cpu()
    model.save_pretrained(folder, state_dict=state)
    path = Path(folder) / "config.json"  # transformers writes the dtype of the model that it was called on
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2) + "\n")


def _add(name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    adapter = _acting.get()
    return None if adapter is None else adapter.add(name, inputs[0], output)


class _Recorder:
    """Acts as an adapter and notes the layers that ask."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def add(self, name: str, *_: Tensor) -> None:
        self.asked.add(name)


@torch.no_grad()
def _check_that_they_run(model: PreTrainedModel, names: list[str]) -> None:
    recorder = _Recorder()
    with use_adapter(recorder):
        model.base_model(**pack([[3, 1, 4, 1, 5]], device=model.device).model_inputs())
    if silent := [name for name in names if name not in recorder.asked]:
        raise UserError(f"lora_targets: {type(model).__name__} computes {silent[0]} without calling the layer")
