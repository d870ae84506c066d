"""Layers are taken over where, and only where, they compute what our ops do; nothing else about a model changes."""

import copy
import functools
import inspect

import pytest
import torch
from tiny import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from fastrlhf.models import fused_layers
from fastrlhf.models.fused_layers import FusedLayer, fuse_layers
from fastrlhf.models.policy import Policy, RewardModel, ValueModel, load_causal_lm
from fastrlhf.packing import pack

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 90}


def taken(model):
    return sorted(name for name, module in model.named_modules() if isinstance(module, FusedLayer))


@pytest.mark.parametrize(("arch", "norms"), [("llama", 2), ("qwen2", 2), ("mistral", 2), ("qwen3", 4)])
def test_norms_mlps_and_attention_of_llama_like_models_are_taken_over(arch, norms):
    model = tiny_model(arch)
    fuse_layers(model)
    found = taken(model)
    assert sum(name.endswith("norm") for name in found) == 2 * norms + 1
    assert sum(name.endswith("mlp") for name in found) == sum(name.endswith("self_attn") for name in found) == 2


@pytest.mark.parametrize(("arch", "rotates"), [("gpt2", False), ("gpt_neox", True), ("gemma3_text", True)])
def test_of_models_with_other_layers_rotations_alone_are_taken_over(arch, rotates):
    model = tiny_model(arch)
    fuse_layers(model)
    assert len(taken(model)) == 2 * rotates and all("attn" in name or "attention" in name for name in taken(model))


def test_a_rotation_of_neighbours_in_a_head_is_left_alone():
    """Cohere pairs the elements 2 i and 2 i + 1 of a head."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("cohere", **SMALL))
    fuse_layers(model)
    assert not [name for name in taken(model) if name.endswith("attn")]


def test_rotations_are_ours_where_a_head_is_turned_whole(monkeypatch):
    calls, original = [], fused_layers.rotary
    monkeypatch.setattr(fused_layers, "rotary", lambda *args: calls.append(1) or original(*args))
    for arch, expected in (("llama", 4), ("gpt_neox", 0)):  # of which neox turns a quarter of each head
        model = load_causal_lm(tiny_model(arch))
        calls.clear()
        model(**pack([[5, 6, 7]]).model_inputs())
        assert len(calls) == expected, arch


def renamed(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        if "states" in kwargs:
            kwargs["hidden_states"] = kwargs.pop("states")
        return function(*args, **kwargs)

    return call


class Decorated:
    """A decorator that keeps what it decorates in an attribute, where a copy of it cannot be put."""

    def __init__(self, function):
        self.function = functools.update_wrapper(self, function).__wrapped__

    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self.function, instance)


@pytest.mark.parametrize("decorators", [(), (renamed,), (renamed, torch.no_grad(), renamed)], ids=len)
def test_rotations_are_taken_over_through_decorators_which_stay(decorators, monkeypatch):
    forward = inspect.unwrap(LlamaAttention.forward)
    for decorator in decorators:
        forward = decorator(forward)
    kind = type("Wrapped", (LlamaAttention,), {"forward": forward})
    holder = nn.Sequential(kind(tiny_model().config, 0))
    holder[0].config._attn_implementation = "sdpa"
    angles = tuple(torch.randn(1, 5, 4).repeat(1, 1, 2) for _ in range(2))
    call = {
        "position_embeddings": angles,
        "attention_mask": None,
        "states" if decorators else "hidden_states": torch.randn(1, 5, 32),
    }
    calls, original = [], fused_layers.rotary
    monkeypatch.setattr(fused_layers, "rotary", lambda *args: calls.append(1) or original(*args))
    theirs = holder[0](**call)[0]
    assert not calls
    fuse_layers(holder)
    calls.clear()  # those of the trial
    ours = holder[0](**call)[0]
    assert len(calls) == 2 and ours.requires_grad == theirs.requires_grad == (len(decorators) < 3)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_a_decorator_that_cannot_be_kept_leaves_the_rotation_alone():
    kind = type("Wrapped", (LlamaAttention,), {"forward": Decorated(inspect.unwrap(LlamaAttention.forward))})
    holder = nn.Sequential(kind(tiny_model().config, 0))
    fuse_layers(holder)
    assert not taken(holder)


class Clamped(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=2.0) * self.up_proj(x))


class Detached(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + 0 * hidden_states.detach()


class Cut(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states).detach() * self.weight / self.weight.detach()


class Told(LlamaRMSNorm):
    def forward(self, hidden_states, told):
        return super().forward(hidden_states) * told


@pytest.mark.parametrize("make", [Gemma3RMSNorm, Cut, Told, nn.LayerNorm, lambda d: LlamaRMSNorm(d, eps=None)])
def test_a_norm_that_computes_something_else_is_left_alone(make):
    holder = nn.Sequential(make(16))
    fuse_layers(holder)
    assert not taken(holder)


def test_a_norm_is_judged_by_what_it_computes():
    holder = nn.Sequential(Detached(16), LlamaRMSNorm(16, eps=1e-3))
    fuse_layers(holder)
    assert taken(holder) == ["0", "1"]


@pytest.mark.parametrize(("kind", "activation"), [(LlamaMLP, "gelu"), (LlamaMLP, "relu"), (Clamped, "silu")])
def test_an_mlp_that_computes_something_else_is_left_alone(kind, activation):
    config = copy.deepcopy(tiny_model().config)
    config.hidden_act = activation
    holder = nn.Sequential(kind(config))
    fuse_layers(holder)
    assert not taken(holder)


def test_other_models_of_the_same_classes_are_not_touched():
    model, other = tiny_model(), tiny_model()
    fuse_layers(model)
    assert taken(model) and not taken(other) and not taken(tiny_model())


def test_a_copy_keeps_the_layers_and_shares_nothing(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    reward = RewardModel.from_pretrained(tmp_path, new_head=True)
    value = ValueModel.from_reward_model(reward)
    assert taken(value) == taken(reward) != []
    with torch.no_grad():
        for parameter in value.parameters():
            parameter.fill_(torch.nan)
    assert all(parameter.isfinite().all() for parameter in reward.parameters())


def test_a_saved_model_is_read_by_transformers_as_before(tmp_path):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "before")
    policy = Policy.from_pretrained(tmp_path / "before")
    policy.save_pretrained(tmp_path / "after")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert type(again) is type(model) and not taken(again)
    for (name, a), (_, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_hooks_and_adapters_within_are_kept():
    """What is put in the place of a projection is called, as adapters are."""

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model = load_causal_lm(tiny_model())
    mlp, x, seen = model.model.layers[0].mlp, torch.randn(3, 32), []
    before = mlp(x)
    mlp.up_proj = Doubled(mlp.up_proj)
    mlp.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(mlp(x), 2 * before)
    assert seen


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_dtypes_are_those_of_transformers(norm_dtype):
    plain = nn.ModuleList([LlamaRMSNorm(16), LlamaMLP(tiny_model().config)])
    ours = copy.deepcopy(plain)
    fuse_layers(ours)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = torch.randn(4, 16).to(norm_dtype), torch.randn(4, 32)
        for x, theirs, mine in ((a, plain[0], ours[0]), (b, plain[1], ours[1])):
            assert mine(x).dtype == theirs(x).dtype
            torch.testing.assert_close(mine(x), theirs(x), atol=0.02, rtol=0.02)
