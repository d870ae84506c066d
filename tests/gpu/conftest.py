"""These tests need a GPU: elsewhere they skip, saying so."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def gpu(device):
    if device != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
