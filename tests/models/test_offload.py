"""offload=idle: who acts is awake, what rests is not touched, and a run is the same with and without.

There is no GPU here. What stands in for its memory: on its way to rest every bit of a tensor is turned over, and again
on its way back, so that a role that acted, or was written, while it rests would change the run."""

import json
from functools import partial

import pytest
import torch
from loops import model_folder, write_rows
from tiny import tiny_tokenizer
from torch import nn

from fastrlhf import PPO, PPOConfig
from fastrlhf.generation.engine import Engine
from fastrlhf.models import offload as offload_module
from fastrlhf.models.offload import check_offload, offload, onloaded
from fastrlhf.models.policy import RewardModel
from fastrlhf.runtime.optim import Optimizer
from fastrlhf.trainers.memory_plan import plan_ppo

pytestmark = pytest.mark.usefixtures("one_thread")
PLACED = {"device": torch.device("cpu"), "autocast": None}
DEVICE = torch.device("cpu")


def turned(tensor):
    return tensor.flatten().view(torch.uint8).bitwise_not().view(tensor.dtype).view(tensor.shape)


@pytest.fixture
def travels(monkeypatch):
    """The transfers that were made: "host" and "device"."""
    made = []
    monkeypatch.setattr(offload_module, "to_host", lambda tensor: (made.append("host"), turned(tensor))[1])
    monkeypatch.setattr(offload_module, "to_device", lambda tensor, _: (made.append("device"), turned(tensor))[1])
    monkeypatch.setattr("fastrlhf.trainers.ppo.trainer.check_offload", lambda *_: None)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("offload")
    model_folder(path / "model")
    write_rows(path / "prompts.jsonl", [{"prompt": f"Say {n}"} for n in range(12)])
    for name, seed in (("reward", 1), ("judge", 2)):
        torch.manual_seed(seed)
        RewardModel.from_pretrained(path / "model", new_head=True).save_pretrained(path / name)
        tiny_tokenizer().save_pretrained(path / name)
    return path


def config(folder, output, **changes):
    common = {"model": str(folder / "model"), "data": str(folder / "prompts.jsonl"), "output": str(output)}
    sizes = {"steps": 3, "batch_size": 4, "epochs": 2, "max_new_tokens": 6, "learning_rate": 1e-3, "save_every": 1}
    held_out = {"eval_data": str(folder / "prompts.jsonl"), "eval_reward": str(folder / "judge"), "eval_every": 2}
    return PPOConfig(**{**common, **sizes, **held_out, "reward": str(folder / "reward"), **changes})


def outcome(trainer):
    return [json.dumps(metrics, sort_keys=True) for metrics in trainer], [
        *map(torch.clone, trainer.policy.parameters())
    ]


def assert_equal(first, second):
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


CHANGES = [
    {},
    {"reference_every": 2, "ema_decay": 0.5},
    {"lora_rank": 2, "lora_alpha": 4.0},
    {"value_lora_rank": 2, "estimator": "gae"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_run_is_the_same_bit_for_bit(folder, tmp_path, travels, changes):
    expected = outcome(PPO(config(folder, tmp_path / "plain", **changes)))
    assert not travels
    trainer = PPO(config(folder, tmp_path / "offloaded", offload="idle", **changes))
    assert travels
    assert_equal(outcome(trainer), expected)


def test_a_run_that_is_resumed_is_the_same(folder, tmp_path, travels, monkeypatch):
    """Moments are saved where they rest, so here they travel as they are."""
    monkeypatch.setitem(globals(), "turned", torch.clone)
    expected = outcome(PPO(config(folder, tmp_path / "plain", reference_every=2)))
    cut = PPO(config(folder, tmp_path / "cut", offload="idle", reference_every=2))
    first = [json.dumps(next(cut), sort_keys=True) for _ in range(2)]
    rows, weights = outcome(PPO(config(folder, tmp_path / "cut", offload="idle", reference_every=2, resume=True)))
    assert_equal((first + rows, weights), expected)


class Watched:
    """The engine on the policy, which calls `first` before it generates."""

    def __init__(self, first, policy):
        self.first, self.engine = first, Engine(policy.model, eos_token_ids=(1,))

    def generate(self, prompts, sampling, **options):
        self.first()
        return self.engine.generate(prompts, sampling, **options)


def test_between_the_phases_all_that_is_idle_rests(folder, tmp_path, travels):
    seen, steps = [], []

    def before_generating(*_):
        idle = {trainer.reference, *(m for m, _ in (*trainer.scorer.models, *trainer.held_out.scorer.models))}
        seen.append(len(idle))
        assert {*idle, *trainer.learner.optimizers} <= {*offload_module._RESTING}
        assert not {trainer.policy, trainer.value_model} & {*offload_module._RESTING}
        states = [state for optimizer in trainer.learner.optimizers for state in optimizer.adam.state.values()]
        steps.append({turned(state["step"]).item() for state in states})

    trainer = PPO(config(folder, tmp_path / "out", offload="idle"), backend=partial(Watched, before_generating))
    next(trainer)
    next(trainer)
    assert seen[:3] == [3, 3, 3]  # reference, reward model, judge
    assert steps[:3] == [set(), set(), {2.0}]  # of Adam, two epochs a step; the held-out prompts before the first


def test_what_shares_the_body_of_a_trained_model_stays(folder, tmp_path, travels):
    trainer = PPO(config(folder, tmp_path / "out", offload="idle", lora_rank=2, reference=None))
    assert trainer.reference not in offload_module._RESTING and trainer.scorer.models[0][0] in offload_module._RESTING


def test_frozen_weights_travel_back_once_and_changed_ones_each_time(travels):
    model = nn.Linear(2, 3)
    offload(model, DEVICE)
    for change in (False, True, False):
        with onloaded(model):
            if change:
                with torch.no_grad():
                    model.weight.fill_(2.0)
    assert travels.count("host") == 2 + 1 and travels.count("device") == 3 * 2
    with onloaded(model):
        assert bool((model.weight == 2.0).all())


def test_within_itself_awake_does_nothing_and_an_error_lets_rest_again(travels):
    model = nn.Linear(2, 3)
    before = model.weight.clone()
    offload(model, DEVICE)
    with pytest.raises(RuntimeError, match="stop"), onloaded(model, None), onloaded(model):
        assert torch.equal(model.weight, before)
        raise RuntimeError("stop")
    assert model in offload_module._RESTING and not torch.equal(model.weight, before)


def test_moments_that_are_made_while_awake_rest_after(travels):
    model = nn.Linear(2, 3)
    options = {"learning_rate": 0.1, "num_steps": 9, "schedule": "constant", "warmup_ratio": 0.0}
    optimizer = Optimizer(model, **options, weight_decay=0.0, eps=1e-5, max_grad_norm=1.0)
    offload(optimizer, DEVICE)
    with onloaded(optimizer):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step("a test")
        moments = [t.clone() for state in optimizer.adam.state.values() for t in state.values()]
    assert travels == ["host"] * len(moments) and len(moments) == 2 * 3
    with onloaded(optimizer):
        again = [t for state in optimizer.adam.state.values() for t in state.values()]
        assert all(torch.equal(a, b) for a, b in zip(again, moments, strict=True))


def test_on_the_cpu_and_with_shards_it_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="on the CPU, where all rests"):
        PPO(config(folder, tmp_path / "out", offload="idle"))
    check_offload("none", DEVICE)
    check_offload("idle", torch.device("cuda"))
    with pytest.raises(ValueError, match="shards stay on the GPU"):
        config(folder, tmp_path / "out", offload="idle", parallel="fsdp")


def test_the_plan_counts_one_of_what_rests(folder, tmp_path):
    whole = plan_ppo(config(folder, tmp_path), PLACED, longest_prompt=5)
    less = plan_ppo(config(folder, tmp_path, offload="idle"), PLACED, longest_prompt=5)
    moments = sum(parts[2] for parts in whole.models.values() if len(parts) > 2)
    frozen = [parts[0] for name, parts in whole.models.items() if name.startswith(("reference", "reward", "judge"))]
    assert len(frozen) == 3 and max(frozen) < moments
    assert less.num_bytes == pytest.approx(whole.num_bytes - sum(frozen))
    assert "less what rests" in str(less) and "less what rests" not in str(whole)
