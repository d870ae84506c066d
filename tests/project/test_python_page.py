"""docs/python.md, the README and the docstrings of trainers: what they show runs, in the order in which it is shown."""

import contextlib
import inspect
import io
import re
import textwrap
from functools import partialmethod
from pathlib import Path

import pytest
from loops import demonstrations, model_folder, pairs, write_rows
from tiny import tiny_tokenizer

import fastrlhf
from fastrlhf import RewardModel
from fastrlhf.data import smollm2
from fastrlhf.settings.shipped import smollm2_folder

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / name).read_text() for name in ("docs/python.md", "README.md")}
SMALL = {"batch_size": 4, "max_new_tokens": 8, "steps": 2}  # in place of defaults, which would take minutes


@pytest.fixture
def small(tmp_path, monkeypatch, one_thread):
    """A working folder with what the pages name, and small defaults."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    model_folder("MODEL")
    smollm2_folder().parent.mkdir(parents=True)
    model_folder(smollm2_folder())  # in place of SmolLM2
    smollm2.mark_whole(smollm2_folder())
    RewardModel.from_pretrained("MODEL", new_head=True).save_pretrained("REWARD")
    tiny_tokenizer().save_pretrained("REWARD")
    demonstrations("demonstrations.jsonl", 12)
    pairs("pairs.jsonl", 8)
    write_rows("prompts.jsonl", [{"prompt": f"Say {n}"} for n in range(8)])
    rows = [{"prompt": f"q{n}", "completion": "yes", "label": n % 2 == 0} for n in range(8)]
    write_rows("labelled.jsonl", rows)
    for name in ("SFTConfig", "RewardConfig", "PPOConfig", "DPOConfig", "KTOConfig"):
        config = getattr(fastrlhf, name)
        defaults = {option: value for option, value in SMALL.items() if option in config.__dataclass_fields__}
        monkeypatch.setattr(config, "__init__", partialmethod(config.__init__, **defaults))
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page, small):
    names, blocks = {}, re.findall(r"^```python\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("trainer", ["SFT", "RewardTrainer", "PPO", "DPO", "KTO"])
def test_the_docstring_of_a_trainer_shows_a_run_in_five_lines(trainer, small):
    lines = inspect.getdoc(getattr(fastrlhf, trainer)).splitlines()
    code = [line for line in lines if line.startswith("    ")]
    assert len(code) == 4
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(textwrap.dedent("\n".join(code)), {})
    (output,) = (small / "runs").iterdir()
    assert (output / "model/model.safetensors").is_file()
