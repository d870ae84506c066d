"""Shared fixtures: the device option, seeds, and poisoned memory."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # tests never reach a model hub

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the contract tests run")


@pytest.fixture(scope="session")
def device(request):
    chosen = request.config.getoption("--device")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda, but torch sees no GPU", returncode=2)
    return chosen


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
def one_thread():
    """Tiny models run on one thread: on a busy machine threads wait for each other far longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
