"""`python tests/faults`: what a run loses when it is killed, disturbed, damaged, or fed with hostile input.

KINDS of trials, for each command: kills at events on files and at any moment; kills while an earlier run is
overwritten; two processes on one output folder; every file of a run damaged in every way; hostile rows; servers that
answer what they should not. What is left in the end must be, bit for bit, what an undisturbed run leaves, or a refusal
of one message with nothing changed.

Each trial is a line of OUTPUT/trials.jsonl, and the same command goes on where it was stopped; a change of the program
begins anew. Prints a table; the exit status is 1 if anything is wrong, and the folder with the evidence then stays.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' tiny models
sys.path.insert(0, str(Path(__file__).parents[2]))

from campaign import KINDS, Campaign, Task
from commands import COMMANDS, OF_ROWS, make_inputs
from tables import tables

from fastrlhf.cli.commands import COMMANDS as OF_CLI


def main() -> int:
    options = parse()
    preload()
    folder, work = options.output.resolve(), options.output.resolve() / "work"
    campaign = Campaign(folder, work, options.seed, options.sample)
    begun, number = time.monotonic(), len(campaign.done)
    print(f"{folder}: {number} trials are done" if number else f"{folder}: begun", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    forks = multiprocessing.get_context("fork")
    maker = forks.Process(target=make_inputs, args=(work,))  # this process itself computes nothing: it is forked
    maker.start()
    maker.join()
    os.chdir(work)
    sys.path.insert(0, str(work))
    counts = {"kills": options.kills, "overwriting": options.overwriting, "pairs": options.pairs}
    tasks = [
        Task(kind, name, counts.get(kind, 1))
        for name in options.commands
        for kind in options.kinds
        if name in KINDS[kind].commands and counts.get(kind, 1)
    ]
    tasks.sort(key=lambda task: task.command not in ("run", "iterate"))  # the long ones first
    with forks.Pool(options.jobs, maxtasksperchild=1) as pool:
        for said in pool.imap_unordered(campaign.run, tasks):
            print(said, flush=True)
    found = campaign.read()
    text = tables(found)
    print(text)
    print(f"{len(found) - number} trials in {time.monotonic() - begun:.0f} seconds")
    for path in (folder / "results.md", *options.table):
        path.write_text(text)
    if any(row.get("is_bad") for row in found):
        print(f"what was wrong: {campaign.path}; what was left: {work}")
        return 1
    shutil.rmtree(work)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="trials with kills, a command")
    parser.add_argument("--overwriting", type=int, default=10, help="kills while a run is overwritten, a command")
    parser.add_argument("--pairs", type=int, default=10, help="of processes, a command")
    parser.add_argument(
        "--sample", type=float, default=1, help="share of damaged files, rows and answers that is tried"
    )
    parser.add_argument("--commands", type=_names, default=[*dict.fromkeys([*COMMANDS, *OF_ROWS])], help="default: all")
    parser.add_argument("--kinds", type=_names, default=[*KINDS], help=f"of {','.join(KINDS)}; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--jobs", type=int, default=2, help="commands that are tried at once")
    parser.add_argument("--output", type=Path, default=Path("build/faults"), help="folder of the trials")
    parser.add_argument("--table", type=Path, action="append", default=[], help="a file for the table")
    options = parser.parse_args()
    options.table = [path.resolve() for path in options.table]
    for name, known in (("commands", {*COMMANDS, *OF_ROWS}), ("kinds", {*KINDS})):
        if unknown := {*getattr(options, name)} - known:
            parser.error(f"unknown {name}: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return options


def _names(text: str) -> list[str]:
    return text.split(",")


def preload() -> None:
    """Imports what the commands import, so that a fork of this process is a command at once."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    import torch
    import transformers
    import transformers.models.llama.modeling_llama

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for command in OF_CLI.values():
        importlib.import_module("fastrlhf." + command.source.partition(":")[0])


if __name__ == "__main__":
    sys.exit(main())
