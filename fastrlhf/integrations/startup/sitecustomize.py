"""Patches a trainer when it is imported, in every Python process that has this folder on PYTHONPATH.

FASTRLHF_PATCH names what to patch: trl, openrlhf, verl, several with commas between, or auto for any. Python
imports the first `sitecustomize` that it finds at its start; one that this shadows is run too. Nothing else is imported
before a trainer is, so that other programs start as fast as before.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from typing import Any

PEERS = ("trl", "openrlhf", "verl")


class Watch(importlib.abc.MetaPathFinder):
    """Finds what others find, and lets `fastrlhf.patch` follow the import of a trainer."""

    def __init__(self, peers: set[str]) -> None:
        self.waiting = peers

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self.waiting:
            return None
        self.waiting.discard(name)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            done = importlib.import_module("fastrlhf").patch(name)
            print(f"fastrlhf.patch({name!r})", done, sep="\n", file=sys.stderr)

        loader.exec_module = exec_module
        return spec


def run_shadowed() -> None:
    """Runs the sitecustomize that would have been found without this folder."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [folder for folder in sys.path if os.path.abspath(folder) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


wanted = {name.strip() for name in os.environ.get("FASTRLHF_PATCH", "").split(",") if name.strip()}
unknown = wanted - {*PEERS, "auto"}
if unknown:
    print(f"FASTRLHF_PATCH: {', '.join(sorted(unknown))} is none of {', '.join(PEERS)}, auto", file=sys.stderr)
if wanted:
    sys.meta_path.insert(0, Watch(set(PEERS) if "auto" in wanted else wanted & set(PEERS)))
run_shadowed()
