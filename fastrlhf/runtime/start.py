"""The start of a run: its processes, its output folder and its seeds."""

from __future__ import annotations

import random

import numpy as np
import torch

from fastrlhf.errors import UserError
from fastrlhf.runtime import distributed
from fastrlhf.runtime.output_folder import OutputFolder
from fastrlhf.runtime.products import check_products
from fastrlhf.settings.training import LoopConfig


def start_run(config: LoopConfig) -> OutputFolder:
    """Joins the other processes of the run, if there are any, and seeds torch, numpy and Python: what a new head and a
    user's reward function draw from. Returns the output folder, which the first process holds.

    Raises: as OutputFolder and check_products; UserError when the processes see different output folders."""
    if distributed.start() == 1 and config.parallel == "fsdp":
        raise UserError("parallel: fsdp needs several processes; torchrun starts them (docs/parallel.md)")
    folder = OutputFolder(config) if distributed.is_main_process() else None
    distributed.all_gather(None)
    folder = folder or OutputFolder(config, hold=False)
    found = distributed.all_gather(str(folder.checkpoint))  # none goes on, and writes there, before all have looked
    if len(set(found)) > 1:
        raise UserError(
            f"output: all processes must see the same folder {config.output}, but their newest "
            f"checkpoints are {', '.join(found)}"
        )
    if folder.is_resumed:
        check_products(folder.path)
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)
    random.seed(config.seed)
    return folder
