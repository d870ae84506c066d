import math
import shutil

import pytest
import torch
from loops import assert_resumes_bit_for_bit, demonstrations, model_folder, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrlhf.errors import NonFiniteError
from fastrlhf.runtime.jsonl import read_jsonl
from fastrlhf.settings.training import SFTConfig
from fastrlhf.trainers.sft import SFT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(tmp_path):
    return {
        "model": model_folder(tmp_path / "model"),
        "data": demonstrations(tmp_path / "data.jsonl"),
        "output": str(tmp_path / "out"),
        "template": "none",
        "max_length": 64,
        "batch_size": 8,
        "device": "cpu",
    }


def run(settings, **changes):
    return list(SFT(SFTConfig(**{**settings, **changes})))


def test_loss_is_that_of_transformers_on_the_response_tokens(settings):
    model = AutoModelForCausalLM.from_pretrained(settings["model"])
    loop = SFT(SFTConfig(**{**settings, "batch_size": 24}))
    total, count = 0.0, 0
    for d in loop.rows:
        ids = torch.tensor([d.tokens])
        labels = torch.where(torch.tensor([d.response_mask]), ids, -100)
        num = sum(d.response_mask)
        total += model(input_ids=ids, labels=labels).loss.item() * num
        count += num
    (metrics,) = loop
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["num_response_tokens"] == count


@pytest.mark.parametrize("max_tokens", [1, 40])
def test_microbatches_do_not_change_the_result(settings, tmp_path, max_tokens):
    whole = run(settings, output=str(tmp_path / "a"), max_tokens=10_000, learning_rate=1e-3)
    parts = run(settings, output=str(tmp_path / "b"), max_tokens=max_tokens, learning_rate=1e-3)
    for a, b in zip(whole, parts, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_gradient_checkpointing_does_not_change_the_result(settings, tmp_path):
    plain = run(settings, output=str(tmp_path / "a"), learning_rate=1e-3)
    again = run(settings, output=str(tmp_path / "b"), learning_rate=1e-3, gradient_checkpointing=True)
    assert [m["loss"] for m in again] == pytest.approx([m["loss"] for m in plain], rel=1e-6)


def test_every_row_is_used_once_an_epoch_and_none_is_dropped(settings):
    metrics = run(settings, epochs=2, batch_size=7)
    loop_tokens = sum(len(d.tokens) for d in SFT(SFTConfig(**{**settings, "overwrite": True})).rows)
    assert len(metrics) == math.ceil(48 / 7)
    assert sum(m["num_tokens"] for m in metrics) == 2 * loop_tokens


def test_it_learns_a_rule(settings, tmp_path):
    """Repeat the last letter four times: a uniform guess among 300 tokens costs log 300 = 5.7."""
    data = demonstrations(tmp_path / "more.jsonl", num=96)
    metrics = run(settings, data=data, epochs=30, learning_rate=1e-2, eval_fraction=0.25)
    assert metrics[0]["loss"] > 5
    assert metrics[-1]["loss"] < 0.2
    assert metrics[-1]["eval/loss"] < 1


def test_the_model_folder_is_plain_transformers(settings):
    loop = SFT(SFTConfig(**settings))
    for _ in loop:
        pass
    folder = f"{settings['output']}/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    trained = loop.model.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert model.generation_config.eos_token_id == 1
    assert tokenizer("ab").input_ids == loop.tokenizer("ab").input_ids


def test_a_killed_run_resumes_bit_for_bit(settings, tmp_path):
    settings |= {"epochs": 3, "save_every": 2, "learning_rate": 1e-3, "eval_fraction": 0.25, "batch_size": 5}
    assert_resumes_bit_for_bit(SFT, SFTConfig, settings, tmp_path, killed_after=5)


def test_a_finished_run_resumes_to_nothing(settings):
    first = run(settings)
    assert run(settings, resume=True) == []
    assert len(read_jsonl(f"{settings['output']}/metrics.jsonl")) == len(first)


def test_a_run_killed_before_its_first_checkpoint_starts_again(settings, capsys):
    whole = run(settings)
    next(SFT(SFTConfig(**settings, overwrite=True)))
    assert run(settings, resume=True) == whole
    assert "no checkpoint in" in capsys.readouterr().out
    assert len(read_jsonl(f"{settings['output']}/metrics.jsonl")) == len(whole)


def test_a_run_killed_before_its_model_was_written_writes_it_on_resume(settings, tmp_path):
    run(settings)
    file = tmp_path / "out" / "model" / "model.safetensors"
    weights = file.read_bytes()
    shutil.rmtree(tmp_path / "out" / "model")
    assert run(settings, resume=True) == []
    assert file.read_bytes() == weights


def test_without_checkpoints_a_run_leaves_only_its_model(settings, tmp_path):
    run(settings, save_every=0)
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert (tmp_path / "out" / "model").is_dir()


def test_changed_data_is_noticed_on_resume(settings, tmp_path):
    run(settings)
    demonstrations(tmp_path / "data.jsonl", seed=1)
    with pytest.raises(ValueError, match=r"resume: data: .*data.jsonl has changed since the run began"):
        SFT(SFTConfig(**settings, resume=True))


def test_nan_stops_and_names_step_rows_and_the_last_good_checkpoint(settings):
    loop = SFT(SFTConfig(**settings, save_every=1))
    next(loop)
    with torch.no_grad():
        loop.model.model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(
        NonFiniteError, match=r"the loss is nan at step 2, rows \[.*the last good checkpoint is .*000001"
    ):
        next(loop)
    restored = SFT(SFTConfig(**settings, save_every=1, resume=True))
    assert restored.num_steps_done == 1
    assert next(restored)["loss"] > 0


def test_an_earlier_run_survives_bad_input(settings, tmp_path):
    """--overwrite deletes only when the new run can begin."""
    run(settings)
    with pytest.raises(ValueError, match="no file"):
        SFT(SFTConfig(**{**settings, "data": str(tmp_path / "nowhere.jsonl"), "overwrite": True}))
    assert read_jsonl(f"{settings['output']}/metrics.jsonl")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"model": {"max_position_embeddings": 8}},
            r"longest_row \(\d+\) must not exceed the model's context of 8",
        ),
        ({"eval_fraction": 0.001}, "eval_fraction 0.001 of 24 rows leaves none"),
        ({"template": "chat", "model": {"chat": False}}, "no chat template"),
        ({"model": {"vocab": 280}}, "the tokenizer has 300 tokens, but the model embeds only 280"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(settings, tmp_path, changes, text):
    if "model" in changes:
        changes = {**changes, "model": model_folder(tmp_path / "other", **changes["model"])}
    with pytest.raises(ValueError, match=text):
        SFT(SFTConfig(**{**settings, **changes}))
    assert not (tmp_path / "out").exists()


def test_a_pad_that_is_the_eos_is_learnt_like_any_token(settings, tmp_path):
    """SmolLM2's pad is its eos: masks come from lengths, so the end of a response still counts."""
    same = run(settings)
    model = model_folder(tmp_path / "other", pad_is_eos=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_pretrained(settings["model"]).save_pretrained(model)
    pad_is_eos = run(settings, model=model, output=str(tmp_path / "b"))
    assert pad_is_eos == same


def test_eval_data_is_read_from_its_own_file(settings, tmp_path):
    file = write_rows(tmp_path / "held_out.jsonl", [{"prompt": "ab", "completion": "aaaa"}] * 3)
    metrics = run(settings, eval_data=file, eval_limit=2, epochs=2)
    assert ["eval/loss" in m for m in metrics] == [False, False, True] * 2
