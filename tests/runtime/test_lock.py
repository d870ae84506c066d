"""The locks that make installs from, against pyproject.toml; and what make says where a Python is missing."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements():
    """name -> specifier of everything that `make test` installs, but torch."""
    texts = PROJECT["dependencies"] + [
        text for extra in ("dev", "demo", "parquet", "tensorboard") for text in EXTRAS[extra]
    ]
    found = {r.name: r.specifier for r in map(Requirement, texts) if r.name not in ("torch", "fastrlhf")}
    return found


def pins(lock):
    lines = (ROOT / "requirements" / lock).read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "name==version, and nothing else"
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("lock", ["lock.txt", "oldest.txt"])
def test_a_lock_pins_all_that_the_project_requires_but_torch(lock):
    found = pins("triton.txt") | pins(lock)
    assert "torch" not in found and {"pip", "setuptools", "huggingface-hub", "tokenizers"} <= found.keys()
    for name, specifier in requirements().items():
        assert specifier.contains(found[name]), name


def test_the_oldest_versions_are_those_that_the_project_allows():
    oldest = dict(
        re.findall(r"(\w+)==([\d.]+)", re.search(r"^OLDEST = (.*)", (ROOT / "Makefile").read_text(), re.M)[1])
    )
    assert oldest.keys() == {"torch", "transformers", "triton"}
    for text in [*PROJECT["dependencies"], *EXTRAS["gpu"]]:
        wanted = Requirement(text)
        if wanted.name in oldest:
            assert f">={oldest[wanted.name].removesuffix('.0')}" == str(wanted.specifier)
    assert {name: pins("oldest.txt")[name] for name in ("transformers", "triton")}.items() <= oldest.items()


def test_a_python_that_is_missing_is_named_with_what_to_do():
    command = ["sh", str(ROOT / "tests/environments/python.sh"), "PYTHON_OLDEST", "3.99", "3.98"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout
    assert "no Python of version 3.99 3.98 is here" in done.stderr and "PYTHON_OLDEST=/path/to/python" in done.stderr
