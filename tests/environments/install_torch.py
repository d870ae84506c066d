"""Installs torch, without the packages of CUDA, for the Python that runs this; then it can be imported.

    .venv-oldest/bin/python tests/environments/install_torch.py torch==2.11.0

Not every release of torch has a CPU build for every Python where pip looks, and the CUDA build brings gigabytes of
packages that tests on a CPU never call. So torch is installed alone, those packages are struck from its metadata, as
later installs would bring them, and then comes what else it needs. Its libraries name those of CUDA, which the loader
must find: in their place stand small libraries, made here with gcc, in which every function returns cudaErrorNoDevice,
so that torch.cuda.is_available() is False. Nothing is made for a CPU build.
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

NO_DEVICE = 100  # cudaErrorNoDevice; also CUDA_ERROR_NO_DEVICE of the driver
OF_CUDA = re.compile(r"Requires-Dist: (nvidia|cuda)-.*\n")


def main() -> None:
    pip = [sys.executable, "-m", "pip", "install"]
    subprocess.run([*pip, "--no-deps", *sys.argv[1:]], check=True)
    site = Path(sysconfig.get_path("purelib"))
    (metadata,) = site.glob("torch-*.dist-info/METADATA")
    metadata.write_text(OF_CUDA.sub("", metadata.read_text(encoding="utf-8")), encoding="utf-8")
    subprocess.run([*pip, *sys.argv[1:]], check=True)
    made = write_stubs(site / "torch" / "lib")
    print(f"stubs of CUDA libraries: {', '.join(made) or 'none, this torch needs none'}")
    check = "import torch; assert not torch.cuda.is_available(); print('torch', torch.__version__, 'on the CPU')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", check], check=True)


def write_stubs(folder: Path) -> list[str]:
    """Writes a library for each that those in the folder need and nobody has; returns their names."""
    libraries = sorted(folder.glob("*.so*"))
    present = {name: path for name, path in re.findall(r"(\S+) \(.*\) => (\S+)", output("ldconfig", "-p"))}
    needed = {name for library in libraries for name in re.findall(r"NEEDED.*\[(.*)\]", readelf("-d", library))}
    missing = sorted(needed - {library.name for library in libraries} - set(present))
    versions = {name: set() for name in missing}
    functions: dict[str, set[str]] = collections.defaultdict(set)  # of each version, "" for none
    for library in libraries:
        for name, version in versions_needed(library):
            versions.get(name, set()).add(version)
        for symbol in symbols("--undefined-only", library):
            name, _, version = symbol.replace("@@", "@").partition("@")
            functions[version].add(name)
    elsewhere = [*libraries, *(present[name] for name in needed & set(present))]
    functions[""] -= {
        symbol.partition("@")[0] for library in elsewhere for symbol in symbols("--defined-only", library)
    }
    functions[""] -= {name for name in functions[""] if name.startswith(("Py", "_Py"))}  # the interpreter has them
    for number, name in enumerate(missing):
        # which library a function without a version comes from is not known, nor asked: the first has them all
        groups = {version: functions[version] for version in sorted(versions[name])}
        write_stub(folder / name, functions[""] if number == 0 else set(), groups)
    return missing


def write_stub(path: Path, plain: Iterable[str], versioned: dict[str, set[str]]) -> None:
    """Compiles a library of functions that return NO_DEVICE; versioned: version -> the functions that have it."""
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stub.c"), Path(folder, "stub.map")
        lines = [f"int stub(void) {{ return {NO_DEVICE}; }}"]
        names = sorted(set(plain).union(*versioned.values()))
        lines += [f'int {name}(void) __attribute__((alias("stub")));' for name in names]
        source.write_text("\n".join([*lines, ""]))
        command = ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{path.name}", "-o", path, source]
        if versioned:
            nodes = [f"{version} {{ global: {'; '.join(sorted(of))}; }};" for version, of in versioned.items() if of]
            script.write_text("\n".join([*nodes, ""]))
            command.append(f"-Wl,--version-script={script}")
        subprocess.run(command, check=True)


def versions_needed(library: Path) -> Iterable[tuple[str, str]]:
    """The (library, version) that a library asks for."""
    file = ""
    for line in readelf("-V", library).splitlines():
        if found := re.search(r"Version: \d+\s+File: (\S+)", line):
            file = found[1]
        elif "Version definition" in line:
            file = ""
        elif file and (found := re.search(r"Name: (\S+)\s+Flags", line)):
            yield file, found[1]


def symbols(kind: str, library: Path | str) -> list[str]:
    return [line.split()[-1] for line in output("nm", "-D", kind, library).splitlines() if line.split()]


def readelf(option: str, library: Path) -> str:
    return output("readelf", "-W", option, library)


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


if __name__ == "__main__":
    main()
