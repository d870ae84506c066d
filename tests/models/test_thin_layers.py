"""A ThinLinear is a linear layer; it takes its own way for few rows without gradients, and no other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch import nn

from fastrlhf.generation.engine import Engine, Sampling
from fastrlhf.models import fused_layers as thin_layers
from fastrlhf.models.fused_layers import ThinLinear
from fastrlhf.models.loading import load_causal_lm


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call of the op had."""
    seen, op = [], thin_layers.thin_linear
    monkeypatch.setattr(thin_layers, "thin_linear", lambda rows, weight: seen.append(len(rows)) or op(rows, weight))
    return seen


def layer_of(width=24, outputs=10, **options):
    layer = nn.Linear(width, outputs, **options)
    holder = nn.Sequential(copy.deepcopy(layer))
    thin_layers.thin_layers(holder)
    assert type(holder[0]) is ThinLinear
    return layer, holder[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (16, 1), (64,), (1, 9)], ids=str)
def test_few_rows_are_taken_over_and_give_the_same(shape, bias, calls):
    layer, thin = layer_of(bias=bias)
    x = torch.randn(*shape, 24)
    with torch.no_grad():
        torch.testing.assert_close(thin(x), layer(x), rtol=1e-5, atol=1e-6)
    assert calls == [x.numel() // 24]


@pytest.mark.parametrize(
    ("rows", "options"),
    [(3, {}), (65, {}), (0, {}), (64, {"width": 4096}), (8, {"dtype": torch.bfloat16}), (8, {"dtype": torch.float64})],
)
def test_others_are_left_to_torch_bit_for_bit(rows, options, calls):
    layer, thin = layer_of(**options)
    x = torch.randn(rows, layer.in_features, dtype=layer.weight.dtype)
    with torch.no_grad():
        assert torch.equal(thin(x), layer(x)) and not calls


def test_gradients_are_torchs(calls):
    layer, thin = layer_of()
    x = torch.randn(8, 24)
    for each in (layer, thin):
        each(x).square().sum().backward()
    assert torch.equal(thin.weight.grad, layer.weight.grad) and torch.equal(thin(x), layer(x)) and not calls


def test_autocast_is_left_to_torch(calls):
    layer, thin = layer_of()
    x = torch.randn(8, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(thin(x), layer(x)) and thin(x).dtype == torch.bfloat16 and not calls


def test_names_hooks_and_subclasses_stay():
    class Other(nn.Linear):
        def forward(self, input):
            return F.linear(input, 2 * self.weight)

    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": Other(3, 3)})
    hook = model["a"].register_forward_hook(lambda module, inputs, output: output + 1)
    names = list(model.state_dict())
    thin_layers.thin_layers(model)
    assert [type(module) for module in model.values()] == [ThinLinear, Other] and list(model.state_dict()) == names
    x = torch.randn(5, 3)
    with torch.no_grad():
        with_hook = model["a"](x)
        hook.remove()
        torch.testing.assert_close(with_hook, model["a"](x) + 1)


def test_a_decode_step_of_a_loaded_model_goes_through_it(calls):
    model = load_causal_lm(tiny_model())
    calls.clear()
    engine = Engine(model, eos_token_ids=[])
    prompts = torch.randint(2, 300, (6, 30)).tolist()
    engine.generate(prompts, Sampling(3), seeds=range(6))
    num_layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert calls == [6] + [6] * 2 * num_layers  # the head at the end of the prompts, then two steps of all
