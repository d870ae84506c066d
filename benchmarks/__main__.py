"""All benchmarks, or those whose names are given, one after the other: python -m benchmarks [NAME ...] [--save ...]

Each runs in a process of its own, with all options (`python -m benchmarks gae --help`); with --tiny in this one, as
starting takes longer than running then. With --save the tables and plots of README.md and benchmarks/README.md are made
anew.
"""

import importlib
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import tables

HERE = Path(__file__).parent
FILES = {  # the module of each benchmark
    path.stem.removeprefix("bench_"): ".".join(path.relative_to(HERE.parent).with_suffix("").parts)
    for path in sorted(HERE.rglob("bench_*.py"))
}
ONE = "import sys; from benchmarks.__main__ import one; one(*sys.argv[1:])"


def one(name: str, *options: str) -> None:
    """A benchmark in this process: the cases that its file declares, or else its `main`."""
    sys.argv = [f"python -m benchmarks {name}", *options]
    module = importlib.import_module(FILES[name])
    if hasattr(module, "cases"):
        from benchmarks.harness import run  # imports torch

        run(name, module)
    else:
        module.main()


def main() -> None:
    names = [argument for argument in sys.argv[1:] if argument in FILES]
    options = [argument for argument in sys.argv[1:] if argument not in FILES]
    if options and not options[0].startswith("-"):
        sys.exit(f"benchmarks: there is no {options[0]!r}; there are {', '.join(FILES)}")
    begin, failed = time.monotonic(), []
    for name in names or FILES:
        start = time.monotonic()
        if "--tiny" in options:
            one(name, *options)
        elif subprocess.run([sys.executable, "-c", ONE, name, *options], cwd=HERE.parent, check=False).returncode:
            failed.append(name)
        took, total = time.monotonic() - start, (time.monotonic() - begin) / 60
        print(f"\n{name}: {took:.0f} s, {total:.1f} minutes in all\n", flush=True)
    if "--save" in options:
        tables.write()
    if failed:
        sys.exit(f"benchmarks: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
