"""`smollm2` and `shipped` name what comes with the package, wherever a model and PPO's prompts are given."""

import json
from pathlib import Path

import pytest
import yaml
from loops import demonstrations, model_folder
from transformers import AutoTokenizer

from fastrlhf import SFT, PPOConfig, SFTConfig
from fastrlhf.cli.commands import COMMANDS
from fastrlhf.data import smollm2
from fastrlhf.data.files import read_rows
from fastrlhf.data.pretrained import read_pretrained
from fastrlhf.settings.run import RunConfig
from fastrlhf.settings.shipped import MODEL_OPTIONS, smollm2_folder
from fastrlhf.settings.values import dump, options_where


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_every_option_that_takes_one_model_knows_the_name():
    found = {name for command in COMMANDS.values() for name in options_where(command.config, path="input")}
    assert found >= {*MODEL_OPTIONS}
    assert {name for name in found if "model" in name or "tokenizer" in name} <= {*MODEL_OPTIONS}


def test_smollm2_is_the_folder_that_it_is_fetched_into_and_trains_like_it(home):
    config = {"data": demonstrations(home / "data.jsonl"), "epochs": 1, "save_every": 0}
    smollm2_folder().parent.mkdir(parents=True)
    model_folder(smollm2_folder())
    smollm2.mark_whole(smollm2_folder())
    named = SFTConfig(model="smollm2", tokenizer="smollm2", output=str(home / "a"), **config)
    assert Path(named.model) == Path(named.tokenizer) == smollm2_folder() == smollm2.fetch()
    folder = SFTConfig(model=str(smollm2_folder()), output=str(home / "b"), **config)
    assert [row["loss"] for row in SFT(named)] == [row["loss"] for row in SFT(folder)]


def test_smollm2_is_fetched_when_it_is_first_read(home):
    smollm2_folder().mkdir(parents=True)
    (smollm2_folder() / "thesis.txt").write_text("mine")
    config = PPOConfig(model="smollm2", data="shipped", reward="r", output="o")  # settings alone fetch nothing
    with pytest.raises(RuntimeError, match="holds something else"):
        read_pretrained(AutoTokenizer, config.model)


def test_a_folder_of_that_name_is_given_with_a_dot():
    assert SFTConfig(model="./smollm2", data="d", output="o").model == "./smollm2"


def test_run_keeps_the_name_so_that_folders_of_older_runs_resume():
    assert RunConfig().model == RunConfig(model="smollm2").model == "smollm2"


def test_shipped_prompts_are_those_of_the_package_and_survive_yaml():
    config = PPOConfig(model="m", data="shipped", reward="r", output="o")
    rows = [row for _, row in read_rows(config.data)]
    assert len(rows) == 500 and all(isinstance(row["prompt"], str) for row in rows)
    assert json.loads(Path(config.data).read_text(encoding="utf-8").splitlines()[0]) == rows[0]
    assert PPOConfig(**yaml.safe_load(dump(config))) == config
    assert SFTConfig(model="m", data="shipped", output="o").data == "shipped"  # a file of that name
