"""The cases of the benchmarks under pytest-benchmark: pytest benchmarks --benchmark-only [-k NAME]

The same as `python -m benchmarks` times in turn, here each function by itself: on the GPU where there is one, else on
the CPU; with BENCHMARK_SIZES=tiny in tiny sizes. Benchmarks that run whole programs declare no cases and are not here.
"""

import importlib
import os
import warnings
from dataclasses import replace

import pytest
import torch

from benchmarks.__main__ import FILES
from benchmarks.case import once

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with warnings.catch_warnings(action="ignore"):  # of what peers import
    MODULES = {name: importlib.import_module(module) for name, module in FILES.items()}
    CASES = [
        pytest.param(case, function, id=f"{name}: {case.name}: {function}")
        for name, module in MODULES.items()
        if hasattr(module, "cases")
        for case in module.cases(module.SIZES[os.environ.get("BENCHMARK_SIZES", DEVICE)], DEVICE)
        for function in case.functions
    ]


@pytest.mark.filterwarnings("default")  # those of peers
@pytest.mark.parametrize(("case", "function"), CASES)
def test_time(case, function, benchmark):
    torch.compiler.reset()
    case = replace(case, functions={function: case.functions[function]})
    inputs = case.make(DEVICE)
    if function not in case.errors(inputs):
        pytest.skip("it is wrong or fails")
    prepared, benchmark.group = case.timed(function, inputs), case.name
    rounds = min(max(int(1000 / once(prepared)), 3), 1000)
    benchmark.pedantic(prepared.run, setup=lambda: (prepared.prepare(), {}), rounds=rounds, warmup_rounds=1)
