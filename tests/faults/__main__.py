"""`python tests/faults`: two processes on one output folder, and kills while an earlier run is overwritten.

For each command, --pairs times two processes start on one folder, and --kills times a process that overwrites an
earlier run is killed (SIGKILL), at an event on a file or at any moment. Nothing may be lost or wrong: what is left in
the end is, bit for bit, what an undisturbed run leaves. Prints a table; the exit status is 1 if anything is wrong, and
the folder with the evidence then stays.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' tiny models
sys.path.insert(0, str(Path(__file__).parents[2]))

from commands import COMMANDS, IN_PAIRS, make_inputs
from kills import try_kills
from pairs_of_processes import try_pairs
from tally import Tally

import fastrlhf.__main__ as command_line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="of processes, a command (0: none)")
    parser.add_argument(
        "--kills", type=int, default=20, help="while an earlier run is overwritten, a command (0: none)"
    )
    parser.add_argument("--commands", default="", help=f"some of {','.join(COMMANDS)}; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--jobs", type=int, default=2, help="commands that are tried at once")
    options = parser.parse_args()
    names = options.commands.split(",") if options.commands else list(COMMANDS)
    if unknown := set(names) - set(COMMANDS):
        parser.error(f"unknown commands: {', '.join(sorted(unknown))}")
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    preload()
    forks = multiprocessing.get_context("fork")
    maker = forks.Process(target=make_inputs, args=(work,))  # this process itself computes nothing: it is forked
    maker.start()
    maker.join()
    os.chdir(work)
    sys.path.insert(0, str(work))
    tasks = [(try_pairs, name, options.pairs) for name in names if name in IN_PAIRS and options.pairs]
    tasks += [(try_kills, name, options.kills) for name in names if options.kills]
    # the long ones first
    tasks.sort(key=lambda task: task[1] not in ("run", "iterate"))
    begun, tallies = time.monotonic(), []
    print(Tally.HEAD, flush=True)
    with forks.Pool(options.jobs, maxtasksperchild=1) as pool:
        for tally in pool.imap_unordered(_tried, [(*task, work, options.seed) for task in tasks]):
            tallies.append(tally)
            print(tally, flush=True)
    print(f"{time.monotonic() - begun:.0f} seconds")
    if any(tally.faults for tally in tallies):
        print(f"what was left: {work}")
        return 1
    shutil.rmtree(work)
    return 0


def _tried(task: tuple) -> Tally:
    tries, *values = task
    return tries(*values)


def preload() -> None:
    """Imports what the commands import, so that a fork of this process is a command at once."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    import torch
    import transformers
    import transformers.models.llama.modeling_llama

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for command in command_line.COMMANDS.values():
        importlib.import_module("fastrlhf." + command.source.partition(":")[0])


if __name__ == "__main__":
    sys.exit(main())
