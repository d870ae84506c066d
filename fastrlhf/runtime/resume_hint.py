"""How far the run in an output folder has come, and the command that goes on with it."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastrlhf.runtime import distributed
from fastrlhf.runtime.checkpoint import newest_checkpoint

LOOPS = ("sft", "reward", "dpo", "kto", "ppo")
# the last file that a command writes; of the others summary.json
LAST = {"run": "report.html", "overoptimize": "report.html", "sweep": "sweep.json"}


def command_of(kind: str) -> str:
    """The command whose settings have this class: BestOfNConfig -> best-of-n."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.removesuffix("Config")).lower()


def extending(config: Any) -> str:
    """What extends a trainer's finished run."""
    return "a larger --steps" if hasattr(config, "steps") else "a larger --epochs"


def is_finished(folder: Path, kind: str) -> bool:
    """Whether the run in an output folder is."""
    command = command_of(kind)
    if command not in LOOPS:
        return (folder / LAST.get(command, "summary.json")).exists()
    noted = next(_objects([_bytes_of(folder / "steps.json")]), {})
    return (folder / "model").exists() and noted.get("model") == max(_steps(folder), default=0)


def describe_progress(folder: Path, kind: str) -> str:
    """What run an output folder holds, and whether it is finished. kind: the class of its settings."""
    command = command_of(kind)
    what, finished = f"a run of fastrlhf {command}", is_finished(folder, kind)
    if command not in LOOPS:
        stages = dict.fromkeys(row["stage"] for row in _rows(folder / "timing.jsonl") if "stage" in row)
        done = f" ({', '.join(stages)} done)" if stages else ""
        return f"{what}, finished" if finished else f"{what}, not finished{done}"
    noted = next(_objects([_bytes_of(folder / "steps.json")]), {})
    last, planned = max(_steps(folder), default=0), noted.get("planned")
    of = f" of {planned}" if isinstance(planned, int) else ""
    steps_done = f"{last}{of} step{'s' * (last != 1 or bool(of))} done"
    return f"{what}, {steps_done}, {'finished' if finished else 'not finished'}"


def resume_hint(command: str, config: Any) -> str:
    """What a command that has ended early left in its output folder; the last line is the command to give next."""
    if not (hasattr(config, "resume") and Path(config.output).exists()):
        return "nothing was left: start again"
    output = config.output
    resume = [*command_line_of(command, output), "--resume", *(["--no-overwrite"] if config.overwrite else [])]
    if command not in LOOPS:
        return f"go on with: {shlex.join(resume)}"
    if newest := newest_checkpoint(output):
        return f"the newest checkpoint is {newest}\ngo on with: {shlex.join(resume)}"
    if any(row.get("step") != 0 for row in _rows(Path(output) / "metrics.jsonl")):
        anew = [*command_line_of(command, output), "--overwrite", *(["--no-resume"] if config.resume else [])]
        return f"there is no checkpoint yet in {output}\nstart anew with: {shlex.join(anew)}"
    again = shlex.join(command_line_of(command, output))
    return f"{output} holds the settings of this run and no step yet\nstart again with: {again}"


def command_line_of(command: str, output: str) -> list[str]:
    """The start of a command line with the settings of a run, as the program was started: by its name, by
    `python -m fastrlhf`, or under torchrun on one machine."""
    program = ["fastrlhf"]
    own = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    if distributed.world_size() > 1:
        program = ["torchrun", "--nproc-per-node", str(distributed.world_size()), "-m", "fastrlhf"]
    elif own[-2:] == ["-m", "fastrlhf"]:
        program = own
    return [*program, *command.split(), "--config", str(Path(output) / "config.yaml")]


def _steps(folder: Path) -> list[int]:
    return [row["step"] for row in _rows(folder / "metrics.jsonl") if isinstance(row.get("step"), int)]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in the lines of a file that may be missing or damaged."""
    return _objects(_bytes_of(path).splitlines())


def _objects(texts: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for text in texts:
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _bytes_of(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
