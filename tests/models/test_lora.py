"""Adapters: what they compute, that the roles of a body do not disturb each other, and what they are saved as."""

import copy
import json

import pytest
import torch
from loops import model_folder
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastrlhf.models.lora import Adapter, linears_of
from fastrlhf.models.policy import Policy, RewardModel, ValueModel
from fastrlhf.packing import pack

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    return model_folder(tmp_path / "model")


def batch():
    tokens = torch.randint(3, 300, (30,)).tolist()
    return pack([tokens[:9], tokens[9:23], tokens[23:]], prompt_lengths=[3, 4, 2])


def shaken(adapter):
    """The adapter with a B that is not 0."""
    with torch.no_grad():
        for up in adapter.up:
            up.normal_(std=0.3)
    return adapter


def roles(folder, *, checkpointing=False, rank=4):
    """Policy, value model and reference on one body."""
    base = Policy.from_pretrained(folder, freeze=True, gradient_checkpointing=checkpointing)
    policy, value = (shaken(Adapter(base.model, rank=rank, alpha=8.0)) for _ in range(2))
    head = torch.randn(1, base.model.config.hidden_size)
    return Policy(base.model, adapter=policy).train(), ValueModel.on_body(base, value, head, 0.5).train(), base


def gradients(*models):
    return [p.grad.clone() for model in models for p in model.parameters() if p.requires_grad]


def test_an_adapter_computes_and_learns_what_its_product_in_the_weights_would(folder):
    """Against the same model, called with other weights: W + alpha / rank B A."""
    policy, value, _ = roles(folder)
    plain, part = Policy.from_pretrained(folder), batch()
    weights = {f"model.{name}": p.detach() for name, p in plain.model.named_parameters()}
    factors = [p.detach().clone().requires_grad_() for p in (*policy.adapter.down, *policy.adapter.up)]
    down, up = factors[: len(factors) // 2], factors[len(factors) // 2 :]
    changed = dict(weights)
    for n, name in enumerate(linears_of(plain.model, "all")):
        changed[f"model.model.{name}.weight"] = weights[f"model.model.{name}.weight"] + 8.0 / 4 * up[n] @ down[n]
    expected = functional_call(plain, changed, (part,))
    expected.sum().backward()
    logprobs = policy(part)
    logprobs.sum().backward()
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients(policy), factors, strict=True):
        torch.testing.assert_close(ours, theirs.grad, atol=1e-4, rtol=1e-4)
    assert len(gradients(policy)) == 2 * 2 * 7 and not any(p.grad is not None for p in value.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_roles_of_a_body_get_the_same_gradients_together_as_one_after_the_other(folder, checkpointing):
    """Also where both forwards come before both backwards, in which checkpointed layers run again."""
    policy, value, _ = roles(folder, checkpointing=checkpointing)
    part = batch()
    policy(part).sum().backward()
    value(part).sum().backward()
    apart = gradients(policy, value)
    for model in (policy, value):
        model.zero_grad()
    (policy(part).sum() + value(part).sum()).backward()
    assert all(map(torch.equal, apart, gradients(policy, value)))
    assert all(gradient.any() for gradient in apart)


def test_recomputed_layers_give_the_gradients_of_kept_ones(folder):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        policy, value, _ = roles(folder, checkpointing=checkpointing)
        part = batch()
        policy(part).sum().backward()
        value(part).sum().backward()
        found.append(gradients(policy, value))
    assert all(map(torch.equal, *found))


def test_the_reference_is_the_untouched_model_bit_for_bit(folder):
    policy, _, reference = roles(folder)
    part = batch()
    assert torch.equal(reference(part), Policy.from_pretrained(folder)(part))
    assert not torch.equal(reference(part), policy(part))
    assert list(reference.model.state_dict()) == list(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_a_new_adapter_leaves_the_policy_as_it_was(folder):
    base, part = Policy.from_pretrained(folder, freeze=True), batch()
    adapter = Adapter(base.model, rank=4, alpha=8.0)
    assert adapter.is_zero and torch.equal(Policy(base.model, adapter=adapter)(part), base(part))
    assert not shaken(adapter).is_zero


def test_only_the_layers_asked_for_have_an_adapter(folder):
    base = Policy.from_pretrained(folder, freeze=True)
    adapter = Adapter(base.model, rank=4, alpha=8.0, targets="q_proj, down_proj")
    assert {name.split(".")[-1] for name in adapter.number} == {"q_proj", "down_proj"} and len(adapter.number) == 4


def test_layers_that_are_not_there_are_named(folder, tmp_path):
    base = Policy.from_pretrained(folder, freeze=True)
    with pytest.raises(ValueError, match=r"has no layers \['query'\]; its linear layers are called down_proj, gate_"):
        Adapter(base.model, rank=4, alpha=8.0, targets="q_proj,query")
    gpt2 = Policy.from_pretrained(model_folder(tmp_path / "gpt2", arch="gpt2"), freeze=True)
    with pytest.raises(ValueError, match="it has no linear layer"):
        Adapter(gpt2.model, rank=4, alpha=8.0)


def test_a_layer_that_is_computed_past_its_module_is_named(folder):
    base = Policy.from_pretrained(folder, freeze=True)
    mlp = base.model.model.layers[1].mlp
    mlp.forward = lambda x: torch.nn.functional.linear(mlp.act_fn(mlp.gate_proj(x)), mlp.down_proj.weight)
    with pytest.raises(ValueError, match=r"computes layers.1.mlp.up_proj without calling the layer"):
        Adapter(base.model, rank=4, alpha=8.0)


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "gemma3_text"])
def test_what_is_saved_computes_the_same_alone_and_merged(tmp_path, arch):
    folder = model_folder(tmp_path / "model", arch=arch)
    policy, value, base = roles(folder)
    part = batch()
    policy.save_pretrained(tmp_path / "policy")
    value.save_trained(tmp_path / "value")
    merged = Policy.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(merged(part), policy(part), atol=1e-5, rtol=1e-5)
    alone = Policy(base.model, adapter=Adapter.load(tmp_path / "policy" / "adapter", base.model)[0])
    assert torch.equal(alone(part), policy(part))
    assert torch.equal(ValueModel.from_adapter(tmp_path / "value", base)(part), value(part))


def test_tied_weights_stay_tied_when_merged(tmp_path):
    policy, *_ = roles(model_folder(tmp_path / "model", tie_word_embeddings=True))
    policy.save_pretrained(tmp_path / "merged")
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


def test_a_frozen_body_in_bfloat16_is_merged_in_float32(folder, tmp_path):
    base = Policy.from_pretrained(folder, freeze=True, dtype=torch.bfloat16, autocast=torch.bfloat16)
    policy = Policy(base.model, autocast=torch.bfloat16, adapter=shaken(Adapter(base.model, rank=4, alpha=8.0)))
    policy.save_pretrained(tmp_path / "merged")
    merged, name = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), "model.layers.0.self_attn.q_proj"
    assert merged.dtype == torch.float32
    before = base.model.get_submodule(name).weight
    assert before.dtype == torch.bfloat16
    expected = before.float() + policy.adapter.weight(name.removeprefix("model."))
    assert torch.equal(merged.get_submodule(name).weight, expected)


def test_an_adapter_of_another_body_is_refused(folder, tmp_path):
    policy, *_ = roles(folder)
    policy.save_trained(tmp_path / "adapter")
    half = Policy.from_pretrained(folder, freeze=True, dtype=torch.bfloat16)
    Adapter.load(tmp_path / "adapter", half.model)
    other = Policy.from_pretrained(model_folder(tmp_path / "other"), freeze=True)
    with pytest.raises(ValueError, match=r"adapter was trained on other weights than those of .*other"):
        Adapter.load(tmp_path / "adapter", other.model)
    with pytest.raises(FileNotFoundError, match=r"adapter: no .*adapter_model.safetensors"):
        Adapter.load(tmp_path, half.model)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames what PEFT calls
def test_the_folder_of_an_adapter_is_in_the_format_of_peft(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install peft: reads our adapters")
    policy, value, _ = roles(folder)
    part = batch()
    policy.save_trained(tmp_path / "policy")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "policy")
    expected = Policy(policy.model, adapter=policy.adapter)(part)
    logits = [theirs(input_ids=tokens[None]).logits[0] for tokens in part.tokens.split(part.lengths)]
    rows = torch.cat(logits)[part.predictors].log_softmax(-1)
    torch.testing.assert_close(rows.gather(1, part.targets[:, None])[:, 0], expected, atol=1e-5, rtol=1e-5)
    value.save_trained(tmp_path / "value")
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "value")
    scores = [theirs(input_ids=tokens[None]).logits[0] for tokens in part.tokens.split(part.lengths)]
    reward = RewardModel(value.model, adapter=value.adapter)
    torch.testing.assert_close(torch.cat(scores) + 0.5, reward(part), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames what PEFT calls
def test_peft_makes_the_settings_that_we_write(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install peft: writes adapters")
    policy, *_ = roles(folder)
    policy.save_trained(tmp_path / "ours")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8.0, target_modules=names, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    model.save_pretrained(tmp_path / "theirs")
    files = [tmp_path / who / "adapter_model.safetensors" for who in ("ours", "theirs")]
    shapes = [{name: tensor.shape for name, tensor in load_file(file).items()} for file in files]
    assert shapes[0] == shapes[1]
    ours, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    theirs["target_modules"].sort()
    assert {**theirs, **ours} == theirs


def test_a_copy_of_a_role_is_trained_apart(folder):
    policy, *_ = roles(folder)
    again = Policy(policy.model, adapter=copy.deepcopy(policy.adapter))
    shaken(again.adapter)
    part = batch()
    assert not torch.equal(policy(part), again(part))


def test_a_whole_value_model_starts_as_a_reward_model_that_is_an_adapter(folder):
    _, value, base = roles(folder)
    reward = RewardModel(value.model, adapter=value.adapter)
    whole, part = ValueModel.from_reward_model(reward), batch()
    torch.testing.assert_close(whole(part), value(part), atol=1e-5, rtol=1e-5)
    assert whole.adapter is None and all(p.requires_grad for p in whole.parameters())
    assert not any(p.requires_grad for p in base.parameters())
