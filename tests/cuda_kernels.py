"""The kernels of csrc/cuda compiled for the CPU, under the names that they have in fastrlhf._cuda.

See cuda_on_cpu/cuda_runtime.h for how a kernel runs there and what that can and cannot catch."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"
SHIM = Path(__file__).parent / "cuda_on_cpu"
SOURCES = {p.stem: p for p in sorted((CSRC / "cuda").glob("*.cu")) if p.stem != "module"}


class Value(ctypes.Union):
    _fields_ = (("i", ctypes.c_int64), ("d", ctypes.c_double))


class Kernel(ctypes.Structure):
    """csrc/kernel.h has the original."""


Kernel._fields_ = (
    ("name", ctypes.c_char_p),
    ("isa", ctypes.c_char_p),
    ("signature", ctypes.c_char_p),
    ("call", ctypes.CFUNCTYPE(None, ctypes.POINTER(Value))),
    ("next", ctypes.POINTER(Kernel)),
)


def compiler():
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


class Kernels:
    """An attribute a kernel of one .cu file: kernels.gae_float32(..., stream)."""

    def __init__(self, source, folder):
        target = folder / f"{source.stem}.so"
        command = [compiler(), "-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas"]
        command += [
            f"-I{SHIM}",
            f"-I{CSRC}",
            f"-I{CSRC / 'cuda'}",
            "-DFASTRLHF_ISA=cuda",
            str(source),
            str(SHIM / "table.cpp"),
        ]
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        self._library = ctypes.CDLL(str(target))
        self._kernels = {}
        at = ctypes.POINTER(Kernel).in_dll(self._library, "cuda_on_cpu_kernels")
        while at:
            self._kernels[at.contents.name.decode()] = at.contents
            at = at.contents.next

    def run_descending(self, descending):
        """Chooses whether blocks and threads run from the last to the first, which must not change a bit."""
        ctypes.c_int.in_dll(self._library, "cuda_on_cpu_descending").value = descending

    def __getattr__(self, name):
        kernel = self._kernels[name]

        def call(*args):
            signature = kernel.signature.decode()
            assert len(args) == len(signature), f"{name} takes {signature}, got {args}"
            values = (Value * len(args))()
            for value, code, arg in zip(values, signature, args, strict=True):
                setattr(value, "d" if code == "d" else "i", arg)
            kernel.call(values)

        return call
