"""The output folder of a run, and checkpoints that a killed run continues from.

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
import warnings
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml

from fastrlhf import _cpu
from fastrlhf.runs import ranks
from fastrlhf.runs.whole import CHECKSUMS, checksums, find_damage, flush, remove, write_file, write_whole
from fastrlhf.settings.values import dump

KEEP = 2  # of a run's checkpoints unless told otherwise: the newest, and the one before it
MARK = "# settings of a fastrlhf run\n"
LINES = ("metrics.jsonl", "timing.jsonl", "samples.jsonl")
OURS = ("config.yaml", *LINES, "checkpoints", "model", "best", "tensorboard")
# a resumed run may change how it runs, not what it computes
MAY_DIFFER = {
    "resume",
    "overwrite",
    "save_every",
    "save_minutes",
    "keep_checkpoints",
    "samples_every",
    "max_slots",
    "kv_budget",
    "cuda_graphs",
    "max_rejected",
    "judge_requests",
    "judge_timeout",
    "judge_key_file",
    "rollout_url",
    "weight_sync",
    "tensorboard",
    "device",
    "output",
    "max_tokens",
    "gradient_checkpointing",
    "share_prompts",
    "parallel",
    "offload",
}


def check_output(config: Any, *, is_finished: bool = False) -> Path | None:
    """Returns the newest checkpoint to resume from, None to start afresh. Changes nothing, so call it before long work.

    A checkpoint whose files are no longer those that were written is named in a warning, and the one before it taken.

    is_finished: the run is not gone on with, so that nothing of its configuration may have changed

    Raises: FileExistsError for a folder that is not empty without resume or overwrite, or that holds no run of ours;
    ValueError when a resumed run's configuration differs in what it computes, or no checkpoint of it is whole."""
    if not _is_resumed(config, may_change=not is_finished):
        return None
    found = _checkpoints(Path(config.output) / "checkpoints")
    for folder in reversed(found):
        damage = find_damage(folder)
        if damage is None:
            return folder
        warnings.warn(f"resume: {folder} is damaged ({damage}) and left out", stacklevel=2)
    if found:
        raise ValueError(f"resume: no checkpoint in {config.output} is whole; --overwrite starts anew")
    return None


def _is_resumed(config: Any, *, may_change: bool = True) -> bool:
    """Whether the output folder holds a run that is to be continued. Raises: as check_output."""
    output = Path(config.output)
    if not output.exists():
        return False
    if not output.is_dir():
        raise FileExistsError(f"output: {output} is a file, expected a folder")
    if all(path.name == "config.yaml.partial" for path in output.iterdir()):  # empty, or killed in open_output
        return False
    if not (config.resume or config.overwrite):
        raise FileExistsError(
            f"output: {output} is not empty: --resume (resume=True) continues, --overwrite deletes it"
        )
    marker = output / "config.yaml"
    if not (marker.is_file() and marker.read_text(encoding="utf-8").startswith(MARK)):
        raise FileExistsError(f"output: {output} holds no fastrlhf run (no config.yaml of one), so it is left alone")
    if config.overwrite:
        return False
    _check_same(yaml.safe_load(marker.read_text(encoding="utf-8")), config, may_change=may_change)
    return True


def open_output(config: Any, ours: Sequence[str] = OURS) -> None:
    """Makes the output folder ready: deletes an earlier run (overwrite), writes config.yaml. Raises: as check_output.

    config: of a loop or of the main job; ours: names of what a run writes: only that is deleted, other files stay"""
    _is_resumed(config)
    output = Path(config.output)
    if config.overwrite:
        for name in ours:
            if name != "config.yaml":  # replaced below: without it a kill would leave a folder that is no longer ours
                remove(output / name)
    output.mkdir(parents=True, exist_ok=True)
    write_file(output / "config.yaml", (MARK + dump(config)).encode())


def newest_checkpoint(output: str | Path) -> Path | None:
    """The checkpoint with the highest step, None if there is none. It is complete, but its files are not read."""
    found = _checkpoints(Path(output) / "checkpoints")
    return found[-1] if found else None


def save_checkpoint(
    output: str | Path, step: int, write: Callable[[Path], None], *, keep: int = KEEP, **state: Any
) -> Path:
    """Writes `<output>/checkpoints/step-NNNNNN`: what write(folder) puts there, and the state. Returns the folder.

    A kill at any moment leaves either the whole checkpoint or none: it is written under another name, flushed to disk
    and renamed, after the metrics up to it. It holds checksums of its files. All processes of a run call this, and the
    first one writes.

    keep: how many checkpoints stay, this one included; state: tensors, numbers, texts, lists and dicts of such"""
    checkpoints = Path(output) / "checkpoints"
    folder, random_states = checkpoints / f"step-{step:06d}", ranks.gather(random_state())
    if not ranks.is_first():
        write(folder)
        return folder
    checkpoints.mkdir(parents=True, exist_ok=True)
    for leftover in checkpoints.glob("*.partial"):
        shutil.rmtree(leftover)

    def write_all(partial: Path) -> None:
        write(partial)
        config = Path(output) / "config.yaml"
        if config.exists():
            shutil.copy(config, partial)
        everything = {**state, "step": step, "random": random_states, "environment": environment()}
        torch.save(everything, partial / "state.pt")
        (partial / CHECKSUMS).write_text(json.dumps(checksums(partial), indent=1), encoding="utf-8")

    for name in LINES:
        if (Path(output) / name).exists():
            flush(Path(output) / name)
    write_whole(folder, write_all)
    for old in _checkpoints(checkpoints)[:-keep]:
        remove(old)
    return folder


def load_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint; restores the random number generators; warns where this machine is another."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    here = environment()
    for name, then in state["environment"].items():
        if here.get(name) != then:
            text = f"resume: {name} was {then} and is {here.get(name)}; the run continues, not bit for bit"
            warnings.warn(text, stacklevel=2)
    restore_random_state(state["random"][ranks.place()[0] % len(state["random"])])
    return state


def environment() -> dict[str, Any]:
    """What the last bits of a result depend on."""
    return {
        "processor": _processor(),
        "instruction set": f"{_cpu.isa}, torch {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "processes": ranks.place()[1],
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def fingerprint(sequences: Iterable[Sequence[int]]) -> int:
    """A checksum of token sequences, by which a resumed run notices that its data changed."""
    checksum = 0
    for sequence in sequences:
        checksum = zlib.crc32(array("q", [len(sequence), *sequence]).tobytes(), checksum)
    return checksum


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


def changes_of(config: Any) -> list[str]:
    """What a run that is resumed changes of its plan: `may_change` of its configuration, as lines to print."""
    marker = Path(config.output) / "config.yaml"
    if not (config.resume and marker.is_file()):
        return []
    saved, now = (yaml.safe_load(text) for text in (marker.read_text(encoding="utf-8"), dump(config)))
    pairs = ((name, saved.get(name, now[name]), now[name]) for name in config.may_change)
    return [f"{name} was {then} and is {new}" for name, then, new in pairs if then != new]


def _check_same(saved: dict[str, Any], config: Any, *, may_change: bool) -> None:
    now = yaml.safe_load(dump(config))
    allowed = MAY_DIFFER | (set(getattr(config, "may_change", ())) if may_change else set())
    for name in {**now, **saved}:
        if name not in allowed and saved.get(name) != now.get(name):
            raise ValueError(
                f"resume: {name} was {saved.get(name)!r} and is {now.get(name)!r}; "
                "give the same, or --overwrite to start anew"
            )


def _checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = re.findall(r"^model name\s*:\s*(.*)$", cpuinfo.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if names:
            return names[0]
    return platform.processor() or platform.machine()
