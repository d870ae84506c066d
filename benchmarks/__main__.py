"""All benchmarks, or those whose names are given, one after the other: python -m benchmarks [NAME ...] [--save ...]

Each runs in a process of its own, with the options that it would take by itself; with --tiny in this one, as starting
takes longer than running then. With --save the tables and plots of README.md and benchmarks/README.md are made anew.
"""

import importlib
import subprocess
import sys
from pathlib import Path

from benchmarks import tables

HERE = Path(__file__).parent


def main() -> None:
    modules = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.rglob("bench_*.py"))}
    names = [argument for argument in sys.argv[1:] if argument in modules]
    options = [argument for argument in sys.argv[1:] if argument not in modules]
    if options and not options[0].startswith("-"):
        sys.exit(f"benchmarks: there is no {options[0]!r}; there are {', '.join(modules)}")
    failed = []
    for name in names or modules:
        module = ".".join(modules[name].relative_to(HERE.parent).with_suffix("").parts)
        if "--tiny" in options:
            sys.argv = [module, *options]
            importlib.import_module(module).main()
        elif subprocess.run([sys.executable, "-m", module, *options], cwd=HERE.parent, check=False).returncode:
            failed.append(name)
        print(flush=True)
    if "--save" in options:
        tables.write()
    if failed:
        sys.exit(f"benchmarks: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
