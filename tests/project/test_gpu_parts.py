"""benchmarks/gpu.sh, on the CPU: what a part measured is there although it was stopped."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.tables import rows_in

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.sh"


@pytest.fixture
def slow_python(tmp_path):
    """Python, in which benchmarks get a second size that takes a minute: a loop over 300000 tokens, again and again."""
    path = tmp_path / "python"
    path.write_text(
        f'#!/bin/sh\n[ "$2" != benchmarks ] || set -- "$@" --sizes 3x8 1x300000\nexec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return path


def test_a_part_that_is_stopped_keeps_the_cases_that_it_finished(slow_python, tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "OUT": str(out), "PYTHON": str(slow_python)}
    part = subprocess.Popen([SCRIPT, "gae", "--dry-run"], env=environment, stdout=subprocess.DEVNULL)
    while not (out / "gae.csv").exists():
        assert part.poll() is None, "the part ended without a result"
        time.sleep(0.1)
    part.terminate()
    assert part.wait(30) == 143
    assert {"3 x 8"} <= {row["case"] for row in rows_in(out / "gae.csv")} <= {"3 x 8", "3 x 8, mask"}
    assert "| 3 x 8 | fastrlhf |" in (out / "gae.md").read_text()
    assert "status 143" in (out / "gae.log").read_text().splitlines()[-1]


def test_an_unknown_part_is_refused():
    done = subprocess.run([SCRIPT, "gea"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr
