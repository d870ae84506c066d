"""python -m fastrlhf: the command line (cli/main.py)."""

import sys

from fastrlhf.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
