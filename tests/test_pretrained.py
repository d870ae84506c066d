"""Errors of loading: a folder says what it lacks, and a hub that cannot be reached is asked once."""

import os
import socket
import subprocess
import sys

import pytest
from loops import ROOT, model_folder
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastrlhf.data.pretrained import read_pretrained

SCRIPT = """
import sys, time
from transformers import AutoTokenizer
from fastrlhf.data.pretrained import read_pretrained
start = time.monotonic()
try:
    read_pretrained(AutoTokenizer, "owner/name")
except FileNotFoundError as error:
    print(f"{time.monotonic() - start:.1f} {error}")
"""


@pytest.mark.parametrize(
    ("auto", "removed", "text"),
    [
        (AutoConfig, "config.json", "no config.json"),
        (AutoModelForCausalLM, "config.json", "no config.json"),
        (AutoModelForCausalLM, "model.safetensors", "no weights"),
        (AutoModelForCausalLM, "*", "no config.json and no weights"),
        (AutoTokenizer, "tokenizer*", "no tokenizer"),
    ],
)
def test_a_folder_says_what_it_lacks_and_where_that_is(tmp_path, auto, removed, text):
    folder = tmp_path / "run"
    model_folder(folder)
    for file in folder.glob(removed):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=rf": cannot load '{folder}': the folder has {text}$"):
        read_pretrained(auto, folder)
    for name in ("best", "model", "other"):
        model_folder(folder / name)
    with pytest.raises(FileNotFoundError, match=rf"the folder has {text}; did you mean {folder / 'model'}\?$"):
        read_pretrained(auto, folder)


@pytest.mark.parametrize("path", ["nowhere", "./nowhere", "/no/where", "a/b/c"])
def test_what_can_be_no_hub_id_is_looked_for_in_no_hub(path):
    with pytest.raises(FileNotFoundError, match=rf"^model: no folder '{path}', and no hub id OWNER/NAME either$"):
        read_pretrained(AutoConfig, path)


def test_a_hub_that_cannot_be_reached_is_told_at_once(tmp_path):
    """transformers waits 1 + 2 + 4 + 8 + 8 seconds between its attempts."""
    with socket.socket() as closed:  # bound, but not listening
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    seconds, _, error = done.stdout.partition(" ")
    assert (
        "tokenizer: no folder 'owner/name', and as a hub id it is neither in the cache nor can it be fetched from"
        in error
    )
    assert url in error and float(seconds) < 10, done.stderr
