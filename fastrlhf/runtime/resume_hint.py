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

LOOPS = ("sft", "reward", "dpo", "ppo")
# the last file that a command writes; of the others summary.json
LAST = {"run": "report.html", "overoptimize": "report.html", "sweep": "sweep.json"}


def command_of(kind: str) -> str:
    """The command whose settings have this class: BestOfNConfig -> best-of-n."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.removesuffix("Config")).lower()


def how_far(folder: Path, kind: str) -> str:
    """What run an output folder holds, and whether it is finished. kind: the class of its settings."""
    command = command_of(kind)
    what = f"a run of fastrlhf {command}"
    if command not in LOOPS:
        is_finished = (folder / LAST.get(command, "summary.json")).exists()
        stages = dict.fromkeys(row["stage"] for row in _rows(folder / "timing.jsonl") if "stage" in row)
        done = f" ({', '.join(stages)} done)" if stages else ""
        return f"{what}, finished" if is_finished else f"{what}, not finished{done}"
    steps = [row["step"] for row in _rows(folder / "metrics.jsonl") if isinstance(row.get("step"), int)]
    noted = next(_objects([_bytes_of(folder / "steps.json")]), {})
    last, planned = max(steps, default=0), noted.get("planned")
    is_finished = (folder / "model").exists() and noted.get("model") == last
    of = f" of {planned}" if isinstance(planned, int) else ""
    steps_done = f"{last}{of} step{'s' * (last != 1 or bool(of))} done"
    return f"{what}, {steps_done}, {'finished' if is_finished else 'not finished'}"


def how_to_go_on(command: str, config: Any) -> str:
    """What a command that has ended early left in its output folder; the last line is the command to give next."""
    if not (hasattr(config, "resume") and Path(config.output).exists()):
        return "nothing was left: start again"
    output = config.output
    resume = [*given(command, output), "--resume", *(["--no-overwrite"] if config.overwrite else [])]
    if command not in LOOPS:
        return f"go on with: {shlex.join(resume)}"
    if newest := newest_checkpoint(output):
        return f"the newest checkpoint is {newest}\ngo on with: {shlex.join(resume)}"
    if any(row.get("step") != 0 for row in _rows(Path(output) / "metrics.jsonl")):
        anew = [*given(command, output), "--overwrite", *(["--no-resume"] if config.resume else [])]
        return f"there is no checkpoint yet in {output}\nstart anew with: {shlex.join(anew)}"
    again = shlex.join(given(command, output))
    return f"{output} holds the settings of this run and no step yet\nstart again with: {again}"


def given(command: str, output: str) -> list[str]:
    """The start of a command line with the settings of a run, as the program was started: by its name, by
    `python -m fastrlhf`, or under torchrun on one machine."""
    program = ["fastrlhf"]
    own = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    if distributed.rank_and_world_size()[1] > 1:
        program = ["torchrun", "--nproc-per-node", str(distributed.rank_and_world_size()[1]), "-m", "fastrlhf"]
    elif own[-2:] == ["-m", "fastrlhf"]:
        program = own
    return [*program, *command.split(), "--config", str(Path(output) / "config.yaml")]


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
