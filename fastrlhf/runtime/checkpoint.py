"""Checkpoints that a killed run continues from, in its output folder.

<output>/config.yaml           the resolved configuration; its first line marks the folder as ours
<output>/metrics.jsonl         deterministic values, a line a step (timing.jsonl: times; samples.jsonl: of PPO)
<output>/checkpoints/step-*    everything the run needs; complete or not there
<output>/model                 the final model (best: of PPO with held-out prompts, the one that answered them best)
"""

from __future__ import annotations

import json
import platform
import random
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from fastrlhf import _cpu
from fastrlhf.errors import UserError
from fastrlhf.runtime import distributed
from fastrlhf.runtime.atomic_io import (
    CHECKSUMS,
    checksums,
    discard,
    find_damage,
    flush,
    recover,
    remove,
    write_file,
    write_whole,
)

MAX_SHARE = 0.05  # of a run's time that is spent on checkpoints, before another one is due by the clock
WRITE_SPEED = 1e8  # bytes a second of the first checkpoint, as a cautious guess
KEEP = 2  # of a run's checkpoints unless told otherwise: the newest, and the one before it
LOG_FILES = ("metrics.jsonl", "timing.jsonl", "samples.jsonl")
COPIED = (
    "config.yaml",
    "inputs.json",
    "metrics.jsonl",
    "samples.jsonl",
)  # into each checkpoint, to mend those beside it


def newest_undamaged_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint whose files are those that were written; None if there is no checkpoint. One that is
    damaged is named in a warning, and the one before it taken.

    Raises: ValueError when none is whole."""
    found = _checkpoints(output / "checkpoints")
    for folder in reversed(found):
        damage = find_damage(folder)
        if damage is None:
            return folder
        warnings.warn(f"resume: {folder} is damaged ({damage}) and left out", stacklevel=2)
    if found:
        raise UserError(f"resume: no checkpoint in {output} is whole; --overwrite starts anew")
    return None


def settings_of_checkpoints(output: Path) -> list[Path]:
    """The copies of config.yaml in the checkpoints, newest first."""
    return [
        path / "config.yaml" for path in _checkpoints(output / "checkpoints")[::-1] if (path / "config.yaml").is_file()
    ]


def newest_checkpoint(output: str | Path) -> Path | None:
    """The checkpoint with the highest step, None if there is none. It is complete, but its files are not read."""
    found = _checkpoints(Path(output) / "checkpoints")
    return found[-1] if found else None


def checkpoint_name(step: int) -> str:
    """The name of the folder of the checkpoint after so many steps."""
    return f"step-{step:06d}"


def has_checkpoint(output: Path, step: int) -> bool:
    """Whether the newest checkpoint is the one after so many steps."""
    newest = newest_checkpoint(output)
    return newest is not None and newest.name == checkpoint_name(step)


def save_checkpoint(
    output: str | Path, step: int, write: Callable[[Path], None], *, keep: int = KEEP, **state: Any
) -> Path:
    """Writes `<output>/checkpoints/step-NNNNNN`: what write(folder) puts there, and the state. Returns the folder.

    A kill at any moment leaves either the whole checkpoint or none: it is written under another name, flushed to disk
    and renamed, after the metrics up to it. It holds checksums of its files. All processes of a run call this, and the
    first one writes.

    keep: how many checkpoints stay, this one included; state: tensors, numbers, texts, lists and dicts of such"""
    checkpoints = Path(output) / "checkpoints"
    folder, random_states = checkpoints / checkpoint_name(step), distributed.all_gather(random_state())
    if not distributed.is_main_process():
        write(folder)
        return folder
    checkpoints.mkdir(parents=True, exist_ok=True)
    recover(folder)
    for leftover in checkpoints.glob("*.partial"):
        discard(leftover)

    def write_all(partial: Path) -> None:
        write(partial)
        for name in COPIED:
            if (Path(output) / name).is_file():
                shutil.copyfile(Path(output) / name, partial / name)
        everything = {**state, "step": step, "random": random_states, "environment": environment()}
        torch.save(everything, partial / "state.pt")
        (partial / CHECKSUMS).write_text(json.dumps(checksums(partial), indent=1), encoding="utf-8")

    for name in LOG_FILES:
        if (Path(output) / name).exists():
            flush(Path(output) / name)
    write_whole(folder, write_all)
    for old in _checkpoints(checkpoints)[:-keep]:
        remove(old)
    return folder


def load_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint; restores the random number generators; warns where this machine is another."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    if folder.name != f"step-{state['step']:06d}":
        raise UserError(f"resume: {folder} holds the checkpoint of step {state['step']}: somebody renamed it")
    here = environment()
    for name, then in state["environment"].items():
        if here.get(name) != then:
            text = f"resume: {name} was {then} and is {here.get(name)}; the run continues, not bit for bit"
            warnings.warn(text, stacklevel=2)
    restore_random_state(state["random"][distributed.rank_and_world_size()[0] % len(state["random"])])
    return state


def environment() -> dict[str, Any]:
    """What the last bits of a result depend on."""
    return {
        "processor": _processor(),
        "instruction set": f"{_cpu.isa}, torch {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def random_state() -> dict[str, Any]:
    """The generators that a user's reward function may draw from; our own draws follow from seed and step."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undoes what was drawn since random_state."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def restore_lines(checkpoint: Path) -> None:
    """Sets each file of lines back to the checkpoint's copy if lines of it are damaged or missing, with a warning."""
    output = checkpoint.parent.parent
    for name in LOG_FILES:
        copy, path = checkpoint / name, output / name
        if not copy.is_file():
            continue
        then = copy.read_bytes()
        now = path.read_bytes() if path.is_file() else b""
        if not now.startswith(then):
            text = f"resume: {path} lacks lines, or they are damaged; those up to {checkpoint.name} are restored"
            warnings.warn(text, stacklevel=2)
            if path.is_dir():
                remove(path)
            write_file(path, then)


def _checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = re.findall(r"^model name\s*:\s*(.*)$", cpuinfo.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if names:
            return names[0]
    return platform.processor() or platform.machine()


class CheckpointClock:
    """Says when a checkpoint is due by the time, so that no more than `minutes` of work are lost; 0: never.

    It waits longer where all checkpoints of the process so far, and another one as long as the last, would take more
    than MAX_SHARE of its time. How long the first one takes is estimated from its bytes."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.begun = self.last = time.monotonic()
        self.seconds = 0.0
        self.seconds_of_last: float | None = None

    def is_due(self, num_bytes: Callable[[], int]) -> bool:
        """Whether it is time for a checkpoint; num_bytes: says how many bytes one takes."""
        now = time.monotonic()
        if not self.minutes or now - self.last < 60 * self.minutes:
            return False
        next_one = num_bytes() / WRITE_SPEED if self.seconds_of_last is None else self.seconds_of_last
        return self.seconds + next_one <= MAX_SHARE * (now - self.begun)

    def saved(self, seconds: float) -> None:
        """Takes note of a checkpoint, and of how long it took."""
        self.last = time.monotonic()
        self.seconds, self.seconds_of_last = self.seconds + seconds, seconds


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """How many bytes tensors take; of sharded ones, all shards together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
