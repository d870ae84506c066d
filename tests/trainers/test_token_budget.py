"""Out of memory: an optimizer step is done again with fewer tokens a micro-batch, and the run goes on with those."""

import json
import random

import numpy as np
import pytest
import torch
from hooks import after_forward
from loops import assert_resumes_bit_for_bit, demonstrations, model_folder, pairs, write_rows

from fastrlhf import PPO, SFT, PPOConfig, RewardConfig, RewardTrainer, SFTConfig
from fastrlhf.models.policy import Policy, RewardModel
from fastrlhf.trainers.token_budget import TokenBudget

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}"} for n in range(40)])
    return tmp_path


def loops(folder):
    """Each loop with settings in which a step is one micro-batch unless memory runs out."""
    common = {"model": str(folder / "model"), "batch_size": 8, "max_tokens": 4096, "learning_rate": 1e-3}
    ppo = {"reward": low_tokens, "steps": 3, "minibatches": 2, "epochs": 2, "max_new_tokens": 8}
    data = demonstrations(folder / "demonstrations.jsonl")
    return {
        "ppo": (PPO, PPOConfig, {**common, **ppo, "data": str(folder / "prompts.jsonl"), "ptx_data": data}),
        "sft": (SFT, SFTConfig, {**common, "data": data}),
        "reward": (RewardTrainer, RewardConfig, {**common, "data": pairs(folder / "pairs.jsonl"), "template": "none"}),
    }


def low_tokens(prompts, responses, *, response_ids, **_):
    return [sum(t < 30 for t in ids) / len(ids) for ids in response_ids]


def fail_above(num_tokens, failed=None):
    """Training passes of policy and reward model run out of memory above so many tokens, after their forward pass;
    the batches of those that did are added to `failed`."""

    def fail(role, inputs, output):
        if torch.is_grad_enabled() and inputs[0].num_tokens > num_tokens:
            if failed is not None:
                failed.append(inputs[0])
            torch.rand(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    return after_forward((Policy, RewardModel), fail)


@pytest.mark.parametrize("name", ["ppo", "sft", "reward"])
def test_a_run_that_is_out_of_memory_goes_on_with_half_and_computes_the_same(folder, capsys, name):
    loop, loop_config, settings = loops(folder)[name]
    expected = list(loop(loop_config(**settings, output=str(folder / "whole"))))
    assert expected
    trainer = loop(loop_config(**settings, output=str(folder / "half")))
    with fail_above(64):
        for ours, theirs in zip(trainer, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert trainer.budget.asked == 4096 and trainer.budget.tokens <= 64
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("out of memory")]
    assert said and all(line.endswith("from here on (CUDA out of memory. Tried to allocate 2 GiB)") for line in said)
    assert len(said) <= 3, "each halving is said once, in the first step"


def test_a_pass_that_failed_leaves_no_gradient_behind(folder):
    """A step that fails in its last micro-batch is the step that did not fail, with those micro-batches."""
    loop, loop_config, settings = loops(folder)["sft"]
    passes = []

    def fail(policy, inputs, output):
        passes.append(inputs[0].num_tokens)
        if len(passes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    failed = loop(loop_config(**{**settings, "max_tokens": 100}, output=str(folder / "failed")))
    with after_forward(Policy, fail):
        step = next(failed)
    assert failed.budget.tokens == 50 < passes[0]
    plain = loop(loop_config(**{**settings, "max_tokens": 50}, output=str(folder / "plain")))
    assert next(plain) == step


def test_random_numbers_are_set_back():
    drawn, budget = [], TokenBudget(100)

    def work(tokens):
        drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
        if tokens == 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tokens

    assert budget.run(work, lengths=[40, 50, 60], optimizers=[]) == 50
    assert drawn[0] == drawn[1] and budget.run(work, lengths=[40, 50, 60], optimizers=[]) == 50


def test_what_fails_was_smaller_than_the_budget_and_is_halved():
    tried, budget = [], TokenBudget(4096)

    def work(tokens):
        tried.append(tokens)
        if tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    budget.run(work, lengths=[30] * 12, optimizers=[])
    assert tried == [4096, 180, 90]


def test_what_is_halved_counts_a_prompt_in_common_once(folder, capsys):
    loop, loop_config, settings = loops(folder)["ppo"]
    settings |= {"samples_per_prompt": 8, "estimator": "rloo", "epochs": 1, "minibatches": 1}
    trainer = loop(loop_config(**settings, output=str(folder / "out")))
    tried = []
    with fail_above(40, tried):
        next(trainer)
    assert tried[0].num_tokens < tried[0].num_tokens_unshared
    assert f"out of memory with {tried[0].num_tokens} tokens" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ppo", "sft", "reward"])
def test_a_single_sequence_that_does_not_fit_ends_the_run_with_advice(folder, name):
    loop, loop_config, settings = loops(folder)[name]
    settings |= {"value_warmup_steps": 0} if name == "ppo" else {}
    with (
        fail_above(1),
        pytest.raises(torch.OutOfMemoryError, match=r"\d+ tokens that cannot be cut do not fit: try gradient_ch"),
    ):
        next(loop(loop_config(**settings, output=str(folder / "out"))))


def test_other_errors_pass(folder):
    with pytest.raises(ZeroDivisionError):
        TokenBudget(8).run(lambda tokens: 1 // 0, lengths=[4], optimizers=[])


def test_a_resumed_run_keeps_what_the_budget_has_become_unless_asked_for_another(folder):
    loop, loop_config, settings = loops(folder)["sft"]
    settings |= {"output": str(folder / "out"), "save_every": 1}
    trainer = loop(loop_config(**settings))
    with fail_above(64):
        next(trainer)
    assert loop(loop_config(**settings, resume=True)).budget.tokens == trainer.budget.tokens < 4096
    assert loop(loop_config(**{**settings, "max_tokens": 2048}, resume=True)).budget.tokens == 2048


def test_a_killed_run_that_was_out_of_memory_resumes_bit_for_bit(folder):
    """In the process that is killed memory runs out as well."""
    _, _, settings = loops(folder)["sft"]
    settings |= {"save_every": 2, "batch_size": 4}
    assert_resumes_bit_for_bit(Tight, SFTConfig, settings, folder, killed_after=5)
    assert len((folder / "whole" / "metrics.jsonl").read_text().splitlines()) == 6
    first = json.loads((folder / "whole" / "timing.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1


class Tight(SFT):
    """SFT with a memory of 40 tokens."""

    def add_gradients(self, batch, done, max_tokens):
        if max_tokens > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().add_gradients(batch, done, max_tokens)
