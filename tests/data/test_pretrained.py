"""Errors of loading: a folder says what it lacks, and a hub that cannot be reached is asked once."""

import os
import socket
import subprocess
import sys

import huggingface_hub
import pytest
from loops import ROOT, model_folder
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fastrlhf.data.pretrained import read_pretrained
from fastrlhf.models.policy import Policy

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
    said = rf"^model '{path}' not found: there is no such folder, and it is no hub id OWNER/NAME either$"
    for auto in (AutoTokenizer, AutoConfig):  # the tokenizer is read first
        with pytest.raises(FileNotFoundError, match=said):
            read_pretrained(auto, path)


def test_a_folder_of_nearly_that_name_is_named_and_a_file_is_called_one(tmp_path, monkeypatch):
    model_folder(tmp_path / "model")
    (tmp_path / "weights").touch()
    monkeypatch.chdir(tmp_path)
    for path, hint in (("modle", "model"), (f"{tmp_path}/modle", f"{tmp_path}/model"), ("./model2/", "./model")):
        with pytest.raises(FileNotFoundError, match=rf"no such folder \(did you mean {hint}\?\), and"):
            read_pretrained(AutoTokenizer, path)
    with pytest.raises(FileNotFoundError, match=r"model '\./weights' not found: it is a file, expected a folder"):
        read_pretrained(AutoTokenizer, "./weights")


def test_a_hub_id_that_is_not_cached_is_not_found(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for auto in (AutoTokenizer, AutoConfig):
        with pytest.raises(FileNotFoundError, match=r"^model 'owner/no-such' not found: there is no such folder, and"):
            read_pretrained(auto, "owner/no-such")


@pytest.mark.parametrize("enabled", [True, False])
def test_loading_and_saving_show_no_bars_and_leave_the_users_setting(tmp_path, capfd, enabled):
    model_folder(tmp_path / "model")
    before = logging.is_progress_bar_enabled(), huggingface_hub.utils.are_progress_bars_disabled()
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
    try:
        capfd.readouterr()
        Policy.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "saved")
        assert capfd.readouterr().err == ""
        assert logging.is_progress_bar_enabled() == enabled
        assert huggingface_hub.utils.are_progress_bars_disabled() == (not enabled)
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert ("Loading weights" in capfd.readouterr().err) == enabled, "a program's own loading is as before"
    finally:
        (logging.enable_progress_bar if before[0] else logging.disable_progress_bar)()
        assert huggingface_hub.utils.are_progress_bars_disabled() == before[1]


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
    assert "model 'owner/name' not found: there is no such folder, and as a hub id it is neither in the cache" in error
    assert url in error and float(seconds) < 10, done.stderr
