"""A job of several stages, each of which leaves a product that is complete or not there."""

from __future__ import annotations

import gc
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastrlhf.runtime import distributed, signals
from fastrlhf.runtime.atomic_io import write_file, write_json
from fastrlhf.runtime.jsonl import append, whole_lines, write_jsonl
from fastrlhf.runtime.output_folder import OutputFolder
from fastrlhf.runtime.products import PRODUCTS, check_products, forget, note_new


class Stages(ABC):
    """An iterator over the stages of a job; each yields its name and a line on what came out.

    A job that was stopped goes on with the first stage whose product is missing, and a loop in it with its newest
    checkpoint. timing.jsonl holds the seconds of each stage.

    products: in order, what each stage leaves in the output folder; a loop's stage has the name of its folder
    always: stages that are done each time; ours: what else the job may have left there, for overwrite

    It holds the output folder from its making on, and changes nothing there before its first stage."""

    passing: tuple[str, ...] = ("checkpoints",)  # what a loop leaves and nobody needs after it

    def __init__(
        self, config: Any, products: Mapping[str, str], *, always: Collection[str] = (), ours: Collection[str] = ()
    ) -> None:
        self.config, self.output = config, Path(config.output)
        self.products, self.always = products, always
        names = {Path(product).parts[0] for product in products.values()}
        own = ("config.yaml", "inputs.json", PRODUCTS, "timing.jsonl", *sorted({*names, *ours}))
        self.folder = OutputFolder(config, own, cheap=("data",))
        self.names, self.is_open = iter(products), False

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return self

    def __next__(self) -> tuple[str, str]:
        """Does the next stage, unless its product is there already."""
        signals.stop_if_asked()  # by a signal that came during the last step of a loop
        if not self.is_open:
            if self.folder.is_resumed:
                check_products(self.output)
            self.folder.open()
            if (timing := self.output / "timing.jsonl").exists():
                write_file(timing, b"".join(whole_lines(timing, "stage", "seconds")))
            self.is_open = True
        self.folder.check()
        try:
            name = next(self.names)
        except StopIteration:
            self.folder.close()
            raise
        if name in self.always or not (self.output / self.products[name]).exists():
            distributed.print_once(f"\n== {name}")
            forget(self.output, name)
            start = time.perf_counter()
            self.do(name)
            append(self.output / "timing.jsonl", {"stage": name, "seconds": time.perf_counter() - start})
            gc.collect()  # this stage's models, before the next loads its own
        else:  # a kill may have come before it was noted
            check_products(self.output / name, leave_out=self.passing)
        line = self.outcome(name)  # first: what a damaged file can be restored from stays
        for passing in self.passing:  # of an earlier start, too, that was killed before it did this
            shutil.rmtree(self.output / name / passing, ignore_errors=True)
        if name not in self.always:
            note_new(self.output, name, self.products[name])
        return name, line

    def do(self, name: str) -> None:
        """Does a stage: here the method of its name."""
        getattr(self, name)()

    @abstractmethod
    def outcome(self, name: str) -> str:
        """A line on what a finished stage left."""


def write_tables(folder: Path, tables: dict[str, Any]) -> None:
    """Writes lists as JSONL and the rest as JSON, by file name."""
    for name, table in tables.items():
        (write_jsonl if name.endswith(".jsonl") else write_json)(folder / name, table)
