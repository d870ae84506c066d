"""Shared fixtures: the device option, seeds, and poisoned memory."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # tests never reach a model hub

import interpreter
import pytest
import torch
from hypothesis import settings

# chosen by --hypothesis-profile: the suite repeats itself, `make fuzz` looks further each time
settings.register_profile("suite", max_examples=30, derandomize=True, deadline=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile("suite")


def pytest_addoption(parser):
    choices = ["cpu", "cuda", "interpreter"]
    parser.addoption("--device", default="cpu", choices=choices, help="where, and as what, the contract tests run")


def pytest_configure(config):
    chosen = config.getoption("--device")
    if chosen == "interpreter":
        interpreter.replace_cpu_kernels()
    elif chosen == "cuda":
        # matrix products are deterministic, as `poisoned` wants them, only with this set before the first of them
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session")
def device(request):
    chosen = request.config.getoption("--device")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda, but torch sees no GPU", returncode=2)
    return "cpu" if chosen == "interpreter" else chosen


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """torch.empty returns NaN, so that an output that a kernel leaves unwritten fails the test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def write(tmp_path):
    """Writes rows, or lines as they are, to a JSONL file; returns its path."""

    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def one_thread():
    """Tiny models run on one thread: on a busy machine threads wait for each other far longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
