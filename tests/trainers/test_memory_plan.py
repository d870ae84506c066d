"""The memory plan: its numbers are those of the run that it plans."""

import pytest
import torch
from loops import demonstrations, model_folder, pairs, write_rows
from tiny import tiny_tokenizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastrlhf import PPO, SFT, DPOConfig, PPOConfig, RewardConfig, RewardTrainer, SFTConfig
from fastrlhf.models.policy import Policy, RewardModel, load_causal_lm
from fastrlhf.packing import pack
from fastrlhf.runtime import distributed
from fastrlhf.trainers import memory_plan
from fastrlhf.trainers.kto import preference_trainer
from fastrlhf.trainers.memory_plan import Plan, plan_ppo, plan_training, print_memory_plan
from fastrlhf.trainers.ppo import trainer as ppo

PLACED = {"device": torch.device("cpu"), "autocast": None}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}"} for n in range(40)])
    RewardModel.from_pretrained(tmp_path / "model", new_head=True).save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    return tmp_path


def config(folder, **changes):
    common = {"model": str(folder / "model"), "data": str(folder / "prompts.jsonl"), "output": str(folder / "out")}
    sizes = {"steps": 1, "batch_size": 8, "epochs": 1, "max_new_tokens": 8, "value_warmup_steps": 0}
    return PPOConfig(**{**common, **sizes, "reward": str(folder / "reward"), **changes})


def nbytes(tensors):
    """Of tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_rank": 4},
        {"eval_data": "prompts.jsonl", "eval_reward": "reward"},
        {"lora_rank": 4, "value_lora_rank": 0, "lora_targets": "q_proj,v_proj", "ema_decay": 0.9},
        {"value_lora_rank": 4, "ema_decay": 0.9},
        {
            "estimator": "rloo",
            "samples_per_prompt": 2,
            "value_warmup_steps": None,
            "lora_rank": 4,
            "reference_every": 1,
        },
    ],
    ids=str,
)
def test_models_gradients_and_moments_take_what_was_planned(folder, changes):
    files = {name: str(folder / changes[name]) for name in ("eval_data", "eval_reward") if name in changes}
    trainer = PPO(config(folder, **{**changes, **files}))
    gradients = []

    def note(optimizer, *_):
        gradients.extend(p.grad for group in optimizer.param_groups for p in group["params"])

    handle = register_optimizer_step_pre_hook(note)
    next(trainer)
    handle.remove()
    roles = [trainer.policy, trainer.reference, trainer.value_model, trainer.models.average]
    scorers = {trainer.scorer, trainer.held_out.scorer}
    roles += [model for scorer in scorers for model, _ in scorer.models]
    weights = nbytes(p for role in roles if role is not None for p in role.parameters())
    states = [o.adam.state for o in trainer.learner.optimizers]
    moments = nbytes(t for state in states for each in state.values() for t in each.values() if t.ndim)
    planned = [sum(parts) for parts in zip(*(pad(parts) for parts in trainer.plan.models.values()), strict=True)]
    assert planned == pytest.approx([weights, nbytes(gradients), moments], rel=0.01)


def pad(parts):
    return (*parts, 0, 0)[:3]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_micro_batch_keeps_for_its_backward_what_was_planned(tmp_path, arch, dtype):
    """Five layers of the model itself, on a pack of other lengths."""
    depth = {"n_layer": 5} if arch == "gpt2" else {"num_hidden_layers": 5}
    folder = model_folder(tmp_path / "model", arch=arch, **depth)
    settings = SFTConfig(model=folder, data="d", output="o", dtype=dtype, max_tokens=100)
    planned = plan_training(settings, settings.placement(), num_tokens=1000).rest["activations of 100 tokens"]
    policy = Policy.from_pretrained(folder, autocast=settings.autocast_dtype())
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def kept(*lengths):
        found = []

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                found.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            assert policy.hidden(pack([[5] * n for n in lengths]), torch.arange(sum(lengths))).requires_grad
        return nbytes(found)

    # of a difference, since autocast keeps copies of the weights too, which are planned elsewhere
    assert planned == pytest.approx(kept(90, 60) - kept(30, 20), rel=0.02)


def test_recomputation_plans_a_fraction(tmp_path):
    folder = model_folder(tmp_path / "model", num_hidden_layers=6)
    plans = [
        plan_training(SFTConfig(model=folder, data="d", output="o", gradient_checkpointing=on), PLACED, num_tokens=500)
        for on in (False, True)
    ]
    kept = [plan.rest["activations of 500 tokens"] for plan in plans]
    assert kept[1] < kept[0] / 3


def test_the_cache_is_that_of_the_engine(folder):
    trainer = PPO(config(folder, max_slots=5))
    longest = max(len(prompt.tokens) for prompt in trainer.prompts)
    expected = 5 * (longest + 8) * trainer.rollout.engine.bytes_per_token()
    assert trainer.plan.rest[f"KV cache, 5 x {longest + 8} tokens"] == expected
    small = plan_ppo(config(folder, max_slots=5, kv_budget=1e-5), PLACED, longest_prompt=longest)
    assert small.rest[f"KV cache, 5 x {longest + 8} tokens"] == 1e-5 * 2**30


def test_the_plan_is_printed_before_a_model_is_loaded_and_compared_at_the_end(folder, monkeypatch, capsys):
    printed = []

    def load(*args, **options):
        printed.append(capsys.readouterr().out)
        return load_causal_lm(*args, **options)

    monkeypatch.setattr("fastrlhf.models.policy.load_causal_lm", load)
    trainer = PPO(config(folder, reward="ppo_runs:share_of_low_tokens", value_warmup_steps=None))
    assert "memory plan, GiB" in printed[0] and "in all" in printed[0]
    assert len(list(trainer)) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    planned = f"memory: {trainer.plan.num_bytes / 2**30:.3f} GiB planned, "
    assert last.startswith(planned) and last.endswith("GiB taken at the peak")


def test_sft_and_reward_training_have_a_plan_too(folder):
    common = {"model": str(folder / "model"), "batch_size": 4, "lora_rank": 4, "template": "none"}
    sft = SFT(SFTConfig(**common, data=demonstrations(folder / "d.jsonl"), output=str(folder / "sft")))
    reward = RewardTrainer(RewardConfig(**common, data=pairs(folder / "p.jsonl"), output=str(folder / "rm")))
    for trainer in (sft, reward):
        assert list(trainer.plan.models) == ["model, frozen", "adapter"]
        role = trainer.model
        factors = sum(p.numel() for p in role.adapter.parameters())
        assert trainer.plan.models["adapter"] == (4 * factors, 4 * factors, 8 * factors)
        assert trainer.plan.models["model, frozen"] == (nbytes(role.model.parameters()),)


def test_a_process_of_two_plans_half_of_each_model_and_one_whole(folder, monkeypatch):
    whole = print_memory_plan(plan_ppo, config(folder), PLACED, longest_prompt=8)
    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (0, 2))
    half = print_memory_plan(plan_ppo, config(folder, parallel="fsdp"), PLACED, longest_prompt=8)
    weights = nbytes(Policy(load_causal_lm(folder / "model")).parameters())
    expected = sum(map(sum, whole.models.values())) / 2 + sum(whole.rest.values()) + weights
    assert half.num_bytes == pytest.approx(expected)


def test_a_plan_that_does_not_fit_is_a_warning_with_advice(folder, monkeypatch, capsys):
    monkeypatch.setattr(memory_plan, "available_bytes", lambda device: 1000.0)
    PPO(config(folder))
    assert "warning: the plan is more than there is; try lora_rank, gradient_checkpointing" in capsys.readouterr().out
    assert "warning" not in str(Plan(models={"model": (1.0,)}, available=2.0))


def test_what_cannot_be_planned_is_left_to_loading(folder, monkeypatch, capsys):
    def refuse(config, placement, **_):
        raise KeyError("no such size\nmore")

    monkeypatch.setattr(ppo, "plan_ppo", refuse)
    assert next(PPO(config(folder)))
    assert "no memory plan: 'no such size" in capsys.readouterr().out


def test_random_numbers_are_left_alone(folder):
    before = torch.get_rng_state()
    assert print_memory_plan(plan_ppo, config(folder, lora_rank=4), PLACED, longest_prompt=9) is not None
    assert torch.equal(before, torch.get_rng_state())


def test_a_reward_model_is_planned_with_all_of_its_heads(folder):
    """Of each that PPO reads; of one head that is named, with that one."""
    ratings = [{"prompt": f"Say {n}", "completion": "x", "ratings": {"a": n, "b": -n, "c": n % 3}} for n in range(8)]
    data = write_rows(folder / "rated.jsonl", ratings)
    settings = {"model": str(folder / "model"), "data": data, "batch_size": 4, "template": "none"}
    trainer = RewardTrainer(RewardConfig(**settings, output=str(folder / "heads")))
    assert trainer.plan.models["model"][0] == nbytes(trainer.model.parameters())
    list(trainer)
    heads = folder / "heads/model"
    for reward, number in ((f"min({heads}#a|{heads}#c)", 3), (f"{heads}#b", 1)):
        ppo = PPO(config(folder, reward=reward, output=str(folder / f"out{number}")))
        ((model, _),) = ppo.scorer.models
        assert len(model.heads) == number
        (planned,) = (parts for name, parts in ppo.plan.models.items() if name.startswith("reward"))
        assert planned == (nbytes(model.parameters()),)
        assert ppo.plan.models["value model"][0] == nbytes(ppo.value_model.parameters())


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({}, False),
        ({"lora_rank": 4}, False),
        ({"lora_rank": 4}, True),
        ({"loss": "kto"}, True),
        ({"loss": "orpo"}, False),
    ],
    ids=str,
)
def test_what_dpo_and_kto_load_first_is_planned_beside_the_policy(folder, changes, other, monkeypatch):
    """A reference of its own, twice as wide, is in memory with the policy, and gone at the first step."""
    wide = model_folder(folder / "wide", intermediate_size=256) if other else None
    rows = [{"prompt": f"Say {n}", "completion": "x" * (1 + n % 2), "label": n % 2 == 0} for n in range(8)]
    data = pairs(folder / "p.jsonl") if changes.get("loss") != "kto" else write_rows(folder / "l.jsonl", rows)
    loaded = []

    def remember(*args, **options):
        loaded.append(load_causal_lm(*args, **options))
        return loaded[-1]

    monkeypatch.setattr("fastrlhf.models.policy.load_causal_lm", remember)
    settings = {"model": str(folder / "model"), "data": data, "output": str(folder / "dpo"), "template": "none"}
    plan = preference_trainer(DPOConfig(**settings, batch_size=4, reference=wide, **changes)).plan
    assert plan.models[next(iter(plan.models))][0] + sum(plan.first.values()) == sum(map(weights, loaded))


def weights(model):
    return nbytes(model.parameters())


def test_the_step_of_the_longest_rows_is_planned(folder):
    rows = [{"prompt": "p", "completion": "x" * n} for n in (3, 40, 1, 30, 2)]
    data = write_rows(folder / "rows.jsonl", rows)
    settings = {"model": str(folder / "model"), "data": data, "output": str(folder / "sft"), "template": "none"}
    trainer = SFT(SFTConfig(**settings, batch_size=2))
    assert "activations of 74 tokens" in trainer.plan.rest  # two prompts and ends, 40 and 30 letters


def test_of_what_comes_in_turn_the_plan_counts_the_larger():
    parts = {"models": {"model": (4.0, 4.0, 8.0)}, "rest": {"activations of 5 tokens": 2.0, "logits of the head": 1.0}}
    assert Plan(**parts, first={"reference": 10.0}).num_bytes == 4 + 1 + 14
    assert Plan(**parts, first={"reference": 20.0}).num_bytes == 4 + 1 + 20


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("reward/model", "reward/model"),
        ("/home/somebody/experiments/2026/helpful/reward/model", ".../2026/helpful/reward/model"),
        ("runs/with-a-name-that-is-much-longer-than-a-line", "...t-is-much-longer-than-a-line"),
        ("owner/name", "owner/name"),
    ],
)
def test_of_a_long_folder_name_whole_folders_of_its_end_are_shown(source, shown):
    name = memory_plan.named("reward 1", source)
    assert name.endswith(shown) and len(name) <= memory_plan.NAME
