"""Real vLLM servers on a CPU, started by the tests, where FASTRLHF_VLLM names a `vllm` command (`make test-vllm`).

vLLM has an environment of its own (tests/environments/vllm_cpu.py); the tests run in ours.
"""

import collections
import os

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from vllm_tools import VOCAB, WIDE, Vllm

_found = collections.defaultdict(list)


def pytest_terminal_summary(terminalreporter):
    if _found:
        terminalreporter.section("largest differences between log-probabilities of vLLM and ours")
        for name, differences in _found.items():
            terminalreporter.write_line(f"{max(differences):.3g} in {len(differences)}: {name}")


@pytest.fixture(scope="session")
def note():
    """Keeps differences, told at the end under a name; returns the largest."""

    def note(name, differences):
        _found[name] += differences
        return max(differences)

    return note


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """serve(model, *options, **environment): the server that these start, one at a time."""
    if not os.environ.get("FASTRLHF_VLLM"):
        pytest.skip("needs vLLM in an environment of its own: make test-vllm")
    folder, running = tmp_path_factory.mktemp("vllm"), {}

    def serve(*arguments, **environment):
        started = (*arguments, *environment.items())
        if started not in running:
            for old in running.values():
                old.stop()
            running.clear()
            running[started] = Vllm(folder, *arguments, **environment)
            running[started].wait()
        return running[started]

    yield serve
    for last in running.values():
        last.stop()


@pytest.fixture(scope="session")
def base_server(serve, models):
    """Serves `base`, and adapters of it of rank 8 at most."""
    options = ("--served-model-name", "base", "--enable-lora", "--max-lora-rank", "8")
    return lambda: serve(models / "base", *options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Random models: `base`, whose head is tied, and `judge`, whose is not."""
    folder = tmp_path_factory.mktemp("models")
    for name, tied in (("base", True), ("judge", False)):
        torch.manual_seed(0)
        # weights that are not small, so that next tokens have probabilities far apart
        model = tiny_model(vocab=VOCAB, tie_word_embeddings=tied, initializer_range=0.15, **WIDE)
        model.save_pretrained(folder / name)
        tiny_tokenizer(VOCAB).save_pretrained(folder / name)
    return folder
