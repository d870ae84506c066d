"""pytest plugin, in OpenRLHF's tests: stands in for packages that need a GPU, and for Ray, where they are missing.

Not for flash_attn.ops: its loss would be called, and OpenRLHF does without it when the import fails.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from unittest.mock import MagicMock

STOOD_IN = ("bitsandbytes", "deepspeed", "flash_attn", "loralib", "optree", "peft", "ray", "ring_flash_attn", "vllm")
MISSING = {
    name
    for name in (*STOOD_IN, "aiohttp", "pylatexenc", "torchdata", "torchmetrics")
    if importlib.util.find_spec(name) is None
}


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in MISSING or name.startswith("flash_attn.ops"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return MagicMock(name=spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(StandIns())
