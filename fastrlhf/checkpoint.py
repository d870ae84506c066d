"""The output folder of a run, and checkpoints that a killed run continues from.

<output>/config.yaml           the resolved configuration; marks the folder as ours
<output>/metrics.jsonl         deterministic values, a line a step (timing.jsonl: times)
<output>/checkpoints/step-*    everything the run needs; complete or not there
<output>/model                 the final model
"""

from __future__ import annotations

import os
import platform
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml

from fastrlhf import _cpu
from fastrlhf.config import LoopConfig, dump

KEEP = 2  # the newest, and the one before it
# a resumed run may change how it runs, not what it computes
MAY_DIFFER = {
    "resume",
    "overwrite",
    "save_every",
    "tensorboard",
    "device",
    "output",
    "max_tokens",
    "gradient_checkpointing",
}


def open_output(config: LoopConfig) -> Path | None:
    """Creates the output folder; returns the newest checkpoint to resume from, None to start afresh.

    Raises: FileExistsError for a folder that is not empty without resume or overwrite, or that overwrite would delete
    though it holds no run of ours; ValueError when a resumed run's configuration differs in what it computes."""
    output = Path(config.output)
    marker = output / "config.yaml"
    if output.exists() and any(output.iterdir()):
        if not (config.resume or config.overwrite):
            raise FileExistsError(
                f"output: {output} is not empty; give --resume to continue or --overwrite to delete it"
            )
        if not marker.is_file():
            raise FileExistsError(f"output: {output} holds no fastrlhf run (no config.yaml), so it is left alone")
        if config.overwrite:
            shutil.rmtree(output)
        else:
            _check_same(yaml.safe_load(marker.read_text(encoding="utf-8")), config)
    output.mkdir(parents=True, exist_ok=True)
    marker.write_text(dump(config), encoding="utf-8")
    return newest_checkpoint(output) if config.resume else None


def newest_checkpoint(output: Path) -> Path | None:
    """The complete checkpoint with the highest step, None if there is none."""
    folders = sorted((output / "checkpoints").glob("step-*[0-9]"))
    return folders[-1] if folders else None


def save_checkpoint(output: str | Path, step: int, write: Callable[[Path], None], **state: Any) -> Path:
    """Writes `<output>/checkpoints/step-NNNNNN`: what write(folder) puts there, and the state. Returns the folder.

    A kill at any moment leaves either the whole checkpoint or none: it is written under another name, flushed to disk
    and renamed. Older ones are deleted but for the one before.

    state: tensors, numbers, texts, lists and dicts of such"""
    folder = Path(output) / "checkpoints" / f"step-{step:06d}"
    partial = folder.with_suffix(".partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    torch.save({**state, "step": step, "random": random_state(), "environment": environment()}, partial / "state.pt")
    for path in partial.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    os.rename(partial, folder)
    for old in sorted(folder.parent.glob("step-*[0-9]"))[:-KEEP]:
        shutil.rmtree(old)
    return folder


def load_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint; restores the random number generators; warns where this machine is another."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    here = environment()
    for name, then in state["environment"].items():
        if here.get(name) != then:
            warnings.warn(
                f"resume: {name} was {then} and is {here.get(name)}; the run continues, not bit for bit", stacklevel=2
            )
    restore_random_state(state["random"])
    return state


def environment() -> dict[str, Any]:
    """What the last bits of a result depend on."""
    return {
        "machine": platform.machine(),
        "instruction set": f"{_cpu.isa}, torch {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def random_state() -> dict[str, Any]:
    """The generators that a user's reward function may draw from; our own draws follow from seed and step."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def _check_same(saved: dict[str, Any], config: LoopConfig) -> None:
    now = yaml.safe_load(dump(config))
    for name in now:
        if name not in MAY_DIFFER and saved.get(name) != now[name]:
            raise ValueError(
                f"resume: {name} was {saved.get(name)!r} and is {now[name]!r}; "
                "give the same, or --overwrite to start anew"
            )
