"""`~` is the home folder wherever a path is given, and stays as it is elsewhere."""

import dataclasses
import re
from pathlib import Path

import pytest

from fastrlhf.cli.commands import COMMANDS
from fastrlhf.cli.options import parse
from fastrlhf.data import read_rows
from fastrlhf.settings.feedback import LabelConfig
from fastrlhf.settings.option import REQUIRED
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.settings.run import RunConfig
from fastrlhf.settings.training import SFTConfig
from fastrlhf.settings.trust import EvaluateRewardConfig
from fastrlhf.settings.values import expand, field_types

MODEL = ["--model", "m", "--data", "d"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_command_line_yaml_and_python_expand_it_alike(home):
    (home / "c.yaml").write_text("output: ~/x\neval_data: ~/e.jsonl\nmodel: m\ndata: d\n")
    for config in (
        parse(SFTConfig, [*MODEL, "--output=~/x", "--eval-data", "~/e.jsonl"]),
        parse(SFTConfig, ["--config=~/c.yaml"]),
        SFTConfig(model="m", data="d", output="~/x", eval_data="~/e.jsonl"),
        SFTConfig(model="m", data=Path("d"), output=Path("~/x"), eval_data=Path("~/e.jsonl")),
    ):
        assert (config.output, config.eval_data, config.data) == (f"{home}/x", f"{home}/e.jsonl", "d")


def test_every_path_in_a_reward_is_expanded(home):
    text = "~/a/model=0.7,lcb(~/b|~/c#head;1),module:function,gate(~|~/d~e;0)"
    expected = f"{home}/a/model=0.7,lcb({home}/b|{home}/c#head;1),module:function,gate({home}|{home}/d~e;0)"
    assert PPOConfig(model="m", data="d", output="o", reward=text).reward == expected
    assert EvaluateRewardConfig(model="~/a, ~/b", data="d", output="o").models == [f"{home}/a", f"{home}/b"]


def test_texts_hub_ids_and_urls_stay_as_they_are(home):
    assert RunConfig(system="~/ is my home").system == "~/ is my home"
    config = LabelConfig(judge="http://host/~me", judge_model="~/m", data="a~b/~c", output="o", rater="~")
    assert (config.judge, config.judge_model, config.data, config.rater) == ("http://host/~me", "~/m", "a~b/~c", "~")
    assert expand("model", "org/name~v2") == "org/name~v2"
    assert expand("output", "~nobody-of-this-name/x") == "~nobody-of-this-name/x"


def test_rows_are_read_from_a_path_with_it(home):
    (home / "a.jsonl").write_text('{"prompt": "q"}\n')
    assert list(read_rows("~/a.jsonl")) == list(read_rows("~/*.jsonl")) == [(1, {"prompt": "q"})]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_is_a_path_by_its_help_is_known_as_one(command, home):
    config = COMMANDS[command].config
    named = re.compile(r"\b(folder|file|hub id|YAML|reward \(docs|of fastrlhf ppo \(docs)\b")
    paths = {
        field.name
        for field in dataclasses.fields(config)
        if "str" in str(field_types(config)[field.name]) and named.search(field.metadata["help"])
    }
    known = {field.name for field in dataclasses.fields(config) if field.metadata["path"]}
    assert paths - {"rater"} <= known and (
        config is RunConfig or "output" in paths or command.startswith(("data", "info", "check"))
    )
    required = {f.name for f in dataclasses.fields(config) if f.default is REQUIRED}
    given = {name: f"~/{name}.jsonl" for name in required} | ({"format": "gsm8k"} if "format" in required else {})
    given |= {"gold": "~/gold"} if command == "iterate" else {}
    made = config(**given)
    assert all(getattr(made, name) == f"{home}/{name}.jsonl" for name in required - {"format"})


@pytest.mark.parametrize("empty", ["", "  "])
@pytest.mark.parametrize("name", ["model", "data", "output", "eval_data", "ptx_data", "reference", "rollout_key_file"])
def test_an_empty_path_is_not_the_current_folder(name, empty):
    with pytest.raises(ValueError, match=f"^{name} is empty"):
        PPOConfig(**{"model": "m", "data": "d", "output": "o", "reward": "r", name: empty})
    with pytest.raises(ValueError, match=r"^config is empty"):
        parse(SFTConfig, ["--config", empty])
