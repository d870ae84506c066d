"""The last layer computes for the rows alone that are read, and gives what it gave for all; else it is left alone."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from fastrlhf.models import last_layer
from fastrlhf.models.fused_layers import FusedLayer
from fastrlhf.models.last_layer import LastLayer
from fastrlhf.models.lora import Adapter
from fastrlhf.models.policy import Policy, RewardModel, load_causal_lm
from fastrlhf.models.shared_prompts import pack_responses
from fastrlhf.packing import pack

LLAMA_LIKE = ("llama", "qwen2", "qwen3", "mistral")
SEQUENCES = [[7, 8, 9, 10, 11, 12], [5, 6], [20, 21, 22, 23], [30, 31, 32]]
PROMPTS = [4, 1, 2, 1]
SHARED = {"prefix_lengths": [0, 0, 0, 2]}  # the last goes on from the third


def a_pack(**options):
    prompts = [*PROMPTS[:3], 0 if options else PROMPTS[3]]
    return pack(SEQUENCES, prompt_lengths=prompts, **options)


def plain(model):
    """The model with its last layer as it was."""
    layer = model.base_model.layers[-1]
    layer.__class__ = layer.__class__.__mro__[2]
    assert not isinstance(layer, LastLayer)
    return model


def results(role, parameters, batch, **options):
    output = role(batch, **options)
    return [output, *torch.autograd.grad(output.pow(2).sum(), list(parameters))]


def is_trimmed(model):
    return isinstance(model.base_model.layers[-1], LastLayer)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-6 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shared", [{}, SHARED])
@pytest.mark.parametrize("arch", LLAMA_LIKE)
def test_logprobs_and_gradients_are_those_of_the_whole_layer(arch, shared, checkpointing):
    model, batch = load_causal_lm(tiny_model(arch), gradient_checkpointing=checkpointing), a_pack(**shared)
    assert is_trimmed(model)
    policy = Policy(model).train()
    ours = results(policy, model.parameters(), batch)
    assert_same(ours, results(Policy(plain(model)), model.parameters(), batch))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_gets_the_gradients_of_the_whole_layer(checkpointing):
    model = load_causal_lm(tiny_model(), freeze=True, gradient_checkpointing=checkpointing)
    adapter = Adapter(model, rank=2, alpha=4.0)
    with torch.no_grad():
        for up in adapter.up:
            up.normal_()
    policy = Policy(model, adapter=adapter).train()
    ours = results(policy, adapter.parameters(), a_pack())
    plain(model)
    assert_same(ours, results(policy, adapter.parameters(), a_pack()))


def test_scores_and_their_gradients_are_those_of_the_whole_layer(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    reward = RewardModel.from_pretrained(tmp_path, new_head=True)
    assert is_trimmed(reward.model)
    ours = results(reward, reward.parameters(), a_pack())
    plain(reward.model)
    assert_same(ours, results(reward, reward.parameters(), a_pack()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_mlp_of_the_last_layer_sees_the_rows_read_and_no_others(checkpointing):
    model, batch, seen = load_causal_lm(tiny_model(), gradient_checkpointing=checkpointing), a_pack(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    Policy(model).train()(batch).sum().backward()
    counts = [batch.num_tokens, batch.num_response_tokens]
    assert seen == counts + (counts[::-1] if checkpointing else [])


@pytest.mark.parametrize("arch", sorted({*ARCHITECTURES} - {*LLAMA_LIKE}))
def test_models_with_other_layers_are_left_alone_and_read_the_same_rows(arch):
    model, batch = load_causal_lm(tiny_model(arch)), a_pack()
    assert not any(isinstance(module, LastLayer) for module in model.modules())
    rows = torch.tensor([3, 9, 3])
    everything = model.base_model(**batch.model_inputs()).last_hidden_state[0]
    assert torch.equal(Policy(model).hidden(batch, rows), everything[rows])


def nodes(node, seen):
    """The names of what a gradient passes."""
    if node is not None and node not in seen:
        seen[node] = node.name()
        for before, _ in node.next_functions:
            nodes(before, seen)
    return set(seen.values())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_of_a_row_that_is_read_for_several_responses_are_added_in_a_fixed_order(arch):
    """Torch's gradient of x[rows] is not: threads add theirs as they come. See test_attention.py for that of gather."""
    policy = Policy(load_causal_lm(tiny_model(arch)))
    batch = pack_responses([[7, 8, 9]] * 3, [[5, 6], [4], [3, 2]], share_prompts=True, device="cpu")
    assert batch.predictors.tolist().count(2) == 3
    passed = nodes(policy(batch).sum().grad_fn, {})
    assert "IndexSelectBackward0" in passed and "IndexBackward0" not in passed


def test_a_layer_that_computes_something_else_from_the_same_parts_is_left_alone():
    """Granite scales what a layer adds."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("granite", **small, vocab_size=90, num_key_value_heads=2, residual_multiplier=0.5)
    model = AutoModelForCausalLM.from_config(config)
    assert set(model.model.layers[-1]._modules) == last_layer.CHILDREN
    assert not is_trimmed(load_causal_lm(model))


def test_a_layer_is_judged_in_float32_whatever_its_dtype():
    model = load_causal_lm(tiny_model(dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert is_trimmed(model) and all(p.dtype == torch.bfloat16 and p.grad is None for p in model.parameters())
    assert isinstance(model.model.layers[-1].mlp, FusedLayer)


def test_without_rows_the_model_computes_as_transformers_does():
    model = tiny_model()
    tokens = torch.tensor([SEQUENCES[0]])
    expected = model(input_ids=tokens).logits
    load_causal_lm(model)
    batch = pack(SEQUENCES[:1])
    torch.testing.assert_close(model(**batch.model_inputs()).logits, expected)
