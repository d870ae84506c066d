"""Models, tokenizers, rewards and rows as objects: a run computes what it would from the folders and files of them."""

import datetime
import json

import numpy as np
import pytest
import torch
import yaml
from objects import COMMON, DATA, PROMPTS, TRAINERS, TUNING, as_objects, as_paths, files_of, make_places
from tiny import tiny_model, tiny_tokenizer

from fastrlhf import PPO, SFT, PPOConfig, SFTConfig
from fastrlhf.cli.main import main
from fastrlhf.data import read_rows
from fastrlhf.errors import DataError, UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("objects"))


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_from_objects_is_that_from_their_folders_and_leaves_them_as_they_are(places, tmp_path, name):
    trainer, config, options = TRAINERS[name]
    paths = as_paths(places, {"model": "model", "data": DATA[name], **options})
    objects = as_objects(paths)
    before, rows = weights_of(objects["model"]), json.dumps(objects["data"])
    tokenizer = objects["tokenizer"].special_tokens_map
    for given, output in ((paths, "paths"), (objects, "objects")):
        trainer(config(**given, output=str(tmp_path / output))).run()
    found = files_of(tmp_path / "objects")
    assert found == files_of(tmp_path / "paths") and len(found) >= 3
    model = objects["model"]
    assert model.config._attn_implementation == "sdpa" and json.dumps(objects["data"]) == rows
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training
    assert objects["tokenizer"].special_tokens_map == tokenizer


@pytest.fixture
def given(places):
    """Options of SFT whose model, tokenizer and data are objects."""
    return as_objects({**as_paths(places, {"model": "model", "data": "demonstrations"}), **TUNING})


def steps_of(output):
    return (output / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_run_from_objects_resumes_bit_for_bit_with_the_same_objects_made_anew(places, tmp_path, name):
    trainer, config, options = TRAINERS[name]
    paths = as_paths(places, {"model": "model", "data": DATA[name], **options})
    trainer(config(**as_objects(paths), output=str(tmp_path / "whole"))).run()
    with trainer(config(**as_objects(paths), output=str(tmp_path / "cut"))) as begun:
        next(begun)
        begun.save_checkpoint()
    resumed = trainer(config(**as_objects(paths), output=str(tmp_path / "cut"), resume=True))
    assert resumed.num_steps_done == 1 < resumed.num_steps
    resumed.run()
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def other_weights(given):
    with torch.no_grad():
        given["model"].get_input_embeddings().weight[3, 3] += 1
    return given


def other_rows(given):
    return {**given, "data": [*given["data"][:-1], {**given["data"][-1], "completion": "another"}]}


def fewer_rows(given):
    return {**given, "data": given["data"][:-1]}


def other_tokenizer(given):
    return {**given, "tokenizer": tiny_tokenizer(chat=False)}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (other_weights, r"model: <LlamaForCausalLM object> \(weights\) has changed since the run began"),
        (other_rows, r"data: <list of 8 rows> \(rows\) has changed since the run began"),
        (fewer_rows, "data was '<list of 8 rows>' and is '<list of 7 rows>'"),
        (other_tokenizer, r"tokenizer: <\w+ object> \(tokenizer\) has changed since the run began"),
    ],
)
def test_a_run_is_not_resumed_with_other_objects(given, tmp_path, change, text):
    with SFT(SFTConfig(**given, output=str(tmp_path))) as begun:
        next(begun)
        begun.save_checkpoint()
    with pytest.raises(UserError, match=text):
        SFT(SFTConfig(**change(given), output=str(tmp_path), resume=True))


def test_the_settings_of_a_run_describe_its_objects_and_no_command_line_goes_on_with_it(given, tmp_path, capsys):
    with SFT(SFTConfig(**given, output=str(tmp_path))) as begun:
        next(begun)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["model"] == "<LlamaForCausalLM object>" and saved["data"] == "<list of 8 rows>"
    assert saved["tokenizer"] == f"<{type(given['tokenizer']).__name__} object>"
    assert main(["sft", "--config", str(tmp_path / "config.yaml"), "--resume"]) == 2
    said = capsys.readouterr().err
    assert "model, data, tokenizer: objects that a Python program gave" in said and said.count("error") == 1


def test_rows_that_are_objects_are_checked_and_reported_as_those_of_a_file(given, tmp_path, capsys):
    rows = [*given["data"], {"prompt": "q", "completion": ""}]
    SFT(SFTConfig(**{**given, "data": rows, "max_rejected": 0.5}, output=str(tmp_path))).close()
    assert "<list of 9 rows>: 8 of 9 rows used\n  1 rejected: empty response (row 9)" in capsys.readouterr().out
    with pytest.raises(DataError, match="1 of 9 rows rejected, more than max_rejected"):
        SFT(SFTConfig(**{**given, "data": rows}, output=str(tmp_path / "strict")))
    with pytest.raises(DataError, match=r"<list of 1 rows> has the columns x; demonstrations are read from: [^(]*$"):
        SFT(SFTConfig(**{**given, "data": [{"x": 1}]}, output=str(tmp_path / "layout")))


@pytest.mark.parametrize(
    ("rows", "error", "text"),
    [
        (["a.jsonl", "b.jsonl"], UserError, "data must be one path or rows, .*; several files are a folder or a glob"),
        ([[]], DataError, "row 1: expected a mapping of columns, such as a dict, got list"),
        (
            [{"prompt": "a", "completion": object()}],
            DataError,
            "row 1: no file could hold it .a value of type object",
        ),
        ([{"prompt": "a", "completion": "b", ("x",): 1}], DataError, "row 1: no file could hold it"),
        ({"train": []}, UserError, "data must be a path or rows, such as a list of dicts, got dict; give one of its"),
        (len, UserError, "data must be a path or rows, such as a list of dicts, got builtin_function"),
        ([], DataError, "<list of 0 rows> has no rows"),
    ],
)
def test_what_is_no_row_is_refused(given, tmp_path, rows, error, text):
    with pytest.raises(error, match=text):
        SFT(SFTConfig(**{**given, "data": rows}, output=str(tmp_path)))


class Table:
    """Rows as datasets.Dataset gives them."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return (dict(row) for row in self.rows)


def test_anything_that_iterates_over_mappings_is_rows(given, tmp_path):
    found = []
    for rows in (given["data"], Table(given["data"]), (row for row in given["data"]), tuple(given["data"])):
        trainer = SFT(SFTConfig(**{**given, "data": rows}, output=str(tmp_path), overwrite=True))
        trainer.close()
        found.append([row.tokens for row in trainer.rows])
    assert len(found[0]) == 6 and found[0] == found[1] == found[2] == found[3]


def test_values_that_json_has_not_become_text_and_lists():
    row = {"prompt": "a", "when": datetime.date(2024, 7, 26), "x": np.arange(2), "y": np.float32(0.5), "z": (1, 2)}
    (_, read), *_ = read_rows([row])
    assert read == {"prompt": "a", "when": "2024-07-26", "x": [0, 1], "y": 0.5, "z": [1, 2]}


def by_peft(model):
    peft = pytest.importorskip("peft", reason="pip install peft: makes adapters")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def with_adapter(model):
    model.peft_config = {"default": "as add_adapter leaves it"}  # which asks for the newest PEFT
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (by_peft, "this PeftModel has adapters of PEFT: give what merge_and_unload"),
        (with_adapter, "this LlamaForCausalLM has adapters of PEFT"),
        (lambda model: model.to("meta"), r"on no device \(meta\)"),
        (lambda model: torch.nn.Linear(2, 2), "must be a folder, a hub id or a model of transformers, got Linear"),
        (lambda model: [], "must be a folder, a hub id or a model of transformers, got .."),
    ],
)
def test_a_model_that_cannot_be_copied_is_refused_by_its_option(given, change, text):
    with pytest.raises(UserError, match=f"^model.*{text}"):
        SFTConfig(**{**given, "model": change(given["model"])}, output="unused")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_what_peft_merges_is_taken(given):
    config = SFTConfig(**{**given, "model": by_peft(given["model"]).merge_and_unload()}, output="unused")
    assert str(config.model) == "<LlamaForCausalLM object>"


def test_a_model_that_is_an_object_needs_a_tokenizer(given):
    with pytest.raises(UserError, match=r"^tokenizer: a model that is an object brings none"):
        SFTConfig(**{**given, "tokenizer": None}, output="unused")
    with pytest.raises(UserError, match=r"^tokenizer must be a folder, a hub id or a tokenizer .*, got {}"):
        SFTConfig(**{**given, "tokenizer": {}}, output="unused")


@pytest.mark.parametrize("arch", ["gpt2", "gemma3_text"])
def test_half_precision_is_widened_as_from_a_folder(given, tmp_path, arch):
    model = tiny_model(arch, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    metrics = []
    for n, source in enumerate((model, str(tmp_path / "bf16"))):
        metrics.append(list(SFT(SFTConfig(**{**given, "model": source}, output=str(tmp_path / str(n))))))
    assert metrics[0] == metrics[1] and model.dtype == torch.bfloat16


def test_the_model_of_a_trainer_is_that_of_the_folder_it_wrote(places, given, tmp_path):
    sft = SFT(SFTConfig(**given, output=str(tmp_path / "sft")))
    sft.run()
    options = {
        **COMMON,
        "data": PROMPTS,
        "steps": 1,
        "max_new_tokens": 4,
        "reward": lambda prompts, responses: [1.0] * 4,
    }
    one = PPO(PPOConfig(model=sft.model, tokenizer=sft.tokenizer, output=str(tmp_path / "a"), **options))
    two = PPO(PPOConfig(model=str(tmp_path / "sft/model"), output=str(tmp_path / "b"), **options))
    assert next(one) == next(two)
    adapter = SFT(SFTConfig(**given, lora_rank=2, output=str(tmp_path / "lora")))
    with pytest.raises(UserError, match="model: this Policy has an adapter: save it, and give the folder"):
        PPOConfig(model=adapter.model, tokenizer=given["tokenizer"], output="unused", **options)


def test_a_tokenizer_may_be_another_one_than_the_models(places, tmp_path):
    plain = tiny_tokenizer(chat=False)
    plain.save_pretrained(tmp_path / "tokenizer")
    paths = as_paths(places, {"model": "model", "data": "demonstrations"})
    for n, tokenizer in enumerate((plain, str(tmp_path / "tokenizer"))):
        with SFT(SFTConfig(**paths, tokenizer=tokenizer, device="cpu", output=str(tmp_path / str(n)))) as trainer:
            assert trainer.tokenizer.chat_template is None and trainer.tokenizer is not plain
