"""PPO with adapters: roles on one body, mixes with whole models, checkpoints, and reward models and SFT as adapters."""

import pytest
import torch
from loops import assert_resumes_bit_for_bit, demonstrations, model_folder, pairs, write_rows
from ppo_runs import share_of_low_tokens
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastrlhf import PPO, SFT, PPOConfig, RewardConfig, RewardTrainer, SFTConfig
from fastrlhf.models.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
LEARNING = {"learning_rate": 3e-2, "value_learning_rate": 1e-2, "schedule": "constant"}


@pytest.fixture
def folder(tmp_path):
    # a head of some size: it is frozen, and that of the usual range could not make any token likely
    model_folder(tmp_path / "model", initializer_range=0.4)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}"} for n in range(40)])
    return tmp_path


def settings(folder, **changes):
    return {
        "model": str(folder / "model"),
        "data": str(folder / "prompts.jsonl"),
        "output": str(folder / "out"),
        "reward": share_of_low_tokens,
        "steps": 3,
        "batch_size": 8,
        "minibatches": 2,
        "epochs": 2,
        "max_new_tokens": 8,
        "lora_rank": 4,
        **LEARNING,
        **changes,
    }


def config(folder, **changes):
    return PPOConfig(**settings(folder, **changes))


def reward_settings(folder, **changes):
    data = pairs(folder / "pairs.jsonl")
    common = {"model": str(folder / "model"), "data": data, "output": str(folder / "reward"), "batch_size": 8}
    return {**common, "lora_rank": 3, "learning_rate": 1e-2, "template": "none", **changes}


@pytest.fixture
def reward(folder):
    """The folder of a reward model that was trained as an adapter on the model of the run."""
    assert list(RewardTrainer(RewardConfig(**reward_settings(folder))))
    return str(folder / "reward" / "model")


def names_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_adapters_on_one_body_ppo_goes_from_below_20_to_above_80_percent(folder, seed):
    changes = {"batch_size": 32, "epochs": 4, "kl_coef": 0.0, "lora_rank": 8, "steps": 16}
    trainer = PPO(config(folder, seed=seed, **changes))
    scores = [metrics["objective/scores"] for metrics in trainer]
    assert scores[0] <= 0.2 and sum(scores[-3:]) / 3 >= 0.8, scores
    bodies = {id(r.model.base_model) for r in (trainer.policy, trainer.reference, trainer.value_model)}
    assert len(bodies) == 1


def test_the_body_stays_as_it_was_and_only_adapters_and_heads_are_in_a_checkpoint(folder):
    trainer = PPO(config(folder, save_every=3))
    assert len(list(trainer)) == 3
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert all(torch.equal(p, q) for p, q in zip(trainer.reference.parameters(), plain.parameters(), strict=True))
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    saved = names_of(folder / "out" / "checkpoints" / "step-000003")
    roles = {f"{role}/{name}" for role in ("policy", "value_model") for name in adapter}
    assert {name for name in saved if "/" in name} == roles
    assert {f"adapter/{name}" for name in adapter} < names_of(folder / "out" / "model")
    values = load_file(folder / "out" / "checkpoints" / "step-000003" / "value_model" / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in values


def test_the_model_that_is_left_is_the_policy_with_its_adapter_in_the_weights(folder):
    trainer = PPO(config(folder))
    assert len(list(trainer)) == 3
    left, batch = Policy.from_pretrained(folder / "out" / "model"), trainer.pack(trainer.generate(trainer.prompts[:4]))
    torch.testing.assert_close(left(batch), trainer.policy.eval()(batch), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(left(batch), trainer.reference(batch), atol=1e-3)


def test_recomputing_activations_changes_nothing(folder):
    runs = [
        list(PPO(config(folder, output=str(folder / str(on)), gradient_checkpointing=on, value_warmup_steps=0)))
        for on in (False, True)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_rank": 4, "value_lora_rank": 0},
        {"lora_rank": 0, "value_lora_rank": 4},
        {"lora_rank": 4, "value_lora_rank": 2, "lora_targets": "o_proj,down_proj", "lora_alpha": 16},
        {"lora_rank": 4, "estimator": "rloo", "samples_per_prompt": 2},
        {"lora_rank": 4, "reference_every": 1, "ema_decay": 0.5},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)
def test_mixes_of_adapters_and_whole_models_learn(folder, changes):
    """One run of so few steps may end in a bad spell that rounding brings about; what does not learn gains about 0."""
    gains = []
    for seed in range(3):
        output = str(folder / f"out{seed}")
        trainer = PPO(
            config(folder, output=output, steps=12, batch_size=32, epochs=4, kl_coef=0.0, seed=seed, **changes)
        )
        scores = [metrics["objective/scores"] for metrics in trainer]
        gains.append(sum(scores[-3:]) / 3 - scores[0])
    assert sum(gains) / 3 > 0.1, gains
    whole = {name: getattr(trainer, name) for name in ("policy", "value_model") if getattr(trainer, name) is not None}
    for name, role in whole.items():
        rank = trainer.config.lora_rank if name == "policy" else trainer.config.value_rank()
        assert (role.adapter.rank if role.adapter is not None else 0) == rank
        assert all(p.requires_grad for p in role.model.base_model.parameters()) == (rank == 0)


def test_a_reward_model_that_is_an_adapter_stands_on_the_same_body_and_the_value_model_starts_as_it(folder, reward):
    trainer = PPO(config(folder, reward=reward))
    scorer, value = trainer.scorer.models[0][0], trainer.value_model
    assert scorer.model.base_model is trainer.policy.model.base_model is value.model.base_model
    assert scorer.bias == value.bias != 0 and torch.equal(scorer.model.score.weight, value.model.score.weight)
    assert value.adapter is not scorer.adapter and value.adapter.rank == scorer.adapter.rank == 3
    assert not any(p.requires_grad for p in scorer.parameters())
    samples = trainer.generate(trainer.prompts[:8])
    batch = trainer.pack(samples)
    alone = PPO(config(folder, reward=reward, lora_rank=0, output=str(folder / "whole")))
    assert alone.scorer.models[0][0].adapter is None
    expected = alone.scorer(alone.prompts[:8], samples, batch)
    torch.testing.assert_close(trainer.scorer(trainer.prompts[:8], samples, batch), expected, atol=1e-5, rtol=1e-5)
    assert "ppo/policy/loss" in next(trainer)  # no step for the value model alone


def test_a_reward_model_on_another_body_is_loaded_whole_and_a_value_adapter_then_starts_at_zero(folder, reward):
    model_folder(folder / "other")
    trainer = PPO(config(folder, model=str(folder / "other"), reward=reward))
    assert trainer.scorer.models[0][0].adapter is None and not trainer.value_model.model.score.weight.any()
    assert "ppo/policy/loss" not in next(trainer)
    whole = PPO(config(folder, reward=reward, value_lora_rank=0, output=str(folder / "b")))
    assert whole.value_model.adapter is None and whole.value_model.bias == whole.scorer.models[0][0].bias
    assert "ppo/policy/loss" in next(whole)


def test_a_killed_run_with_adapters_resumes_bit_for_bit(folder, reward):
    changes = {"reward": reward, "steps": 8, "save_every": 2, "reference_every": 3, "ema_decay": 0.9}
    run = settings(folder, **changes, gradient_checkpointing=True)
    assert_resumes_bit_for_bit(PPO, PPOConfig, run, folder, killed_after=5)


def test_a_killed_reward_run_with_an_adapter_resumes_bit_for_bit(folder):
    run = reward_settings(folder, epochs=2, save_every=2)
    assert_resumes_bit_for_bit(RewardTrainer, RewardConfig, run, folder, killed_after=5)


def test_a_killed_sft_run_with_an_adapter_resumes_bit_for_bit(folder):
    data = demonstrations(folder / "demonstrations.jsonl")
    run = {"model": str(folder / "model"), "data": data, "batch_size": 4, "learning_rate": 1e-2, "lora_rank": 4}
    assert_resumes_bit_for_bit(SFT, SFTConfig, {**run, "save_every": 2}, folder, killed_after=5)


def test_a_resumed_run_whose_model_changed_is_refused(folder):
    trainer = PPO(config(folder, save_every=1))
    next(trainer)
    model_folder(folder / "model")
    with pytest.raises(ValueError, match="has changed since the run began"):
        PPO(config(folder, save_every=1, resume=True))


def test_reward_training_with_an_adapter_learns_the_pairs(folder):
    metrics = list(RewardTrainer(RewardConfig(**reward_settings(folder, epochs=4, eval_fraction=0.25))))
    assert metrics[-1]["eval/accuracy"] >= 0.8 and metrics[0]["loss"] > metrics[-1]["loss"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lora_rank": 0, "lora_alpha": 8}, "lora_alpha and lora_targets are of adapters, and there is none"),
        ({"lora_rank": -1}, "lora_rank must be at least 0"),
        ({"estimator": "rloo", "samples_per_prompt": 2, "value_lora_rank": 2}, "value_lora_rank: rloo has no value"),
        ({"reference_every": 2, "reference": "other"}, "reference_every: an adapter cannot become the reference"),
        ({"lora_targets": "query"}, r"lora_targets: LlamaModel has no layers \['query'\]"),
    ],
)
def test_settings_that_do_not_fit_are_named(folder, changes, text):
    with pytest.raises(ValueError, match=text):
        PPO(config(folder, **changes))


def test_a_killed_run_with_moments_of_a_byte_resumes_bit_for_bit(folder):
    pytest.importorskip("bitsandbytes", reason="pip install 'fastrlhf[bitsandbytes]'")
    changes = {"reward": "ppo_runs:share_of_low_tokens", "steps": 4, "save_every": 2, "lora_rank": 0}
    run = settings(folder, **changes, optimizer="adamw8bit")
    assert_resumes_bit_for_bit(PPO, PPOConfig, run, folder, killed_after=3)
