"""Packed models against transformers itself, padded and one sequence at a time."""

import json

import pytest
import torch
import torch.nn.functional as F
from compare import filled
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from fastrlhf.models.policy import Policy, RewardModel, ValueModel, load_causal_lm
from fastrlhf.packing import pack

VOCAB = 300
LENGTHS = (5, 1, 23, 12)


def sequences(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def padded(tokens):
    longest = max(map(len, tokens))
    ids = torch.zeros(len(tokens), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(tokens):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    return ids, mask


def save(tmp_path, arch, **changes):
    torch.manual_seed(3)
    tiny_model(arch, VOCAB, **changes).save_pretrained(tmp_path / arch)
    return tmp_path / arch


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_equals_padded_in_logits_and_gradients(tmp_path, arch, checkpointing):
    folder, tokens = save(tmp_path, arch), sequences()
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids, mask = padded(tokens)
    logits = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    weights = torch.randn(logits.shape)
    (logits * weights).sum().backward()

    ours = load_causal_lm(folder, gradient_checkpointing=checkpointing).train()
    packed_logits = ours(**pack(tokens).model_inputs()).logits[0]
    (packed_logits * weights).sum().backward()
    torch.testing.assert_close(packed_logits, logits, atol=1e-5, rtol=0)
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        scale = b.grad.abs().max().item()
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5 * max(scale, 1.0), rtol=0, msg=name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_policy_logprobs_and_entropies_are_those_of_the_models_logits(tmp_path, arch):
    folder, tokens = save(tmp_path, arch), sequences()
    policy = Policy.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = [2, 1, 9, 0][: len(tokens)]
    prompts = [min(max(p, 1), len(t)) for p, t in zip(prompts, tokens, strict=True)]
    logprobs, entropies = policy(pack(tokens, prompt_lengths=prompts), temperature=0.7, return_entropy=True)
    expected = []
    for sequence, prompt in zip(tokens, prompts, strict=True):
        rows = (plain(torch.tensor([sequence])).logits[0] / 0.7).log_softmax(-1)
        for t in range(prompt, len(sequence)):
            row = rows[t - 1]
            expected.append((row[sequence[t]], -(row.exp() * row).sum()))
    torch.testing.assert_close(logprobs, torch.stack([a for a, _ in expected]), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropies, torch.stack([b for _, b in expected]), atol=1e-5, rtol=0)


def new_reward_model(path, **options):
    return RewardModel.from_pretrained(path, new_head=True, **options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_reward_model_folder_gives_the_same_scores_in_plain_transformers(tmp_path, arch):
    reward_model = new_reward_model(save(tmp_path, arch))
    reward_model.bias = 0.25
    reward_model.save_pretrained(tmp_path / "rm")
    tokens = sequences()
    scores = RewardModel.from_pretrained(tmp_path / "rm")(pack(tokens))
    assert torch.equal(scores, reward_model(pack(tokens)))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    expected = torch.stack([plain(torch.tensor([s])).logits[0, 0] for s in tokens]) + 0.25
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_values_before_the_first_response_token_equal_the_score_of_the_prompt(tmp_path):
    reward_model = new_reward_model(save(tmp_path, "llama"))
    reward_model.bias = -1.5
    value_model = ValueModel.from_reward_model(reward_model)
    tokens = sequences((9, 14))
    values = value_model(pack(tokens, prompt_lengths=[4, 6]))
    for n, (sequence, first, prompt) in enumerate(zip(tokens, (0, 5), (4, 6), strict=True)):
        for t in filled(range(prompt, len(sequence))):
            score = reward_model(pack([sequence[:t]]))[0]
            torch.testing.assert_close(values[first + t - prompt], score, atol=1e-5, rtol=0, msg=f"{n} {t}")


def test_value_model_of_a_policy_starts_at_zero_and_is_a_copy(tmp_path):
    policy = Policy.from_pretrained(save(tmp_path, "llama"))
    value_model = ValueModel.from_policy(policy)
    batch = pack(sequences((9, 14)), prompt_lengths=[4, 6])
    assert not value_model(batch).any()
    before = {name: p.clone() for name, p in policy.named_parameters()}
    value_model(batch).sum().backward()
    with torch.no_grad():
        for parameter in value_model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


def test_save_and_load_is_exact(tmp_path):
    policy = Policy.from_pretrained(save(tmp_path, "llama", tie_word_embeddings=True))
    policy.save_pretrained(tmp_path / "again")
    again = Policy.from_pretrained(tmp_path / "again")
    for (name, a), (_, b) in zip(policy.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert again.model.get_output_embeddings().weight is again.model.get_input_embeddings().weight


def test_dropout_is_off_even_in_train(tmp_path):
    folder = save(tmp_path, "gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    policy = Policy.from_pretrained(folder).train()
    batch = pack(sequences(), prompt_lengths=[1] * 4)
    assert torch.equal(policy(batch), policy(batch))


def test_padding_is_refused(tmp_path):
    model = load_causal_lm(save(tmp_path, "llama"))
    ids, mask = padded(sequences())
    with pytest.raises(ValueError, match="takes packed sequences"):
        model(input_ids=ids, attention_mask=mask)


class Own(LlamaAttention):
    """An attention that asks no interface how to attend, as models have that transformers has not moved to it."""

    def forward(self, hidden_states, *_, **__):
        heads = (t(hidden_states).unflatten(-1, (-1, self.head_dim)) for t in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (t.transpose(1, 2) for t in heads)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(attended.transpose(1, 2).flatten(2)), None


def test_a_model_that_is_not_on_the_attention_interface_is_refused():
    model = tiny_model("llama", VOCAB)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Own
    with pytest.raises(ValueError, match="LlamaForCausalLM is not on"):
        load_causal_lm(model)


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="/no/such/model"):
        load_causal_lm("/no/such/model")


def test_a_classifier_with_several_labels_is_no_reward_model(tmp_path):
    config = tiny_model("llama", VOCAB).config
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="must have 1 label, got 3"):
        RewardModel.from_pretrained(tmp_path / "three")


def test_a_head_that_scales_its_logits_in_an_unknown_way_is_refused(tmp_path, monkeypatch):
    forward = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 3
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ValueError, match="LlamaForCausalLM: packed it computes something else"):
        load_causal_lm(save(tmp_path, "llama"))


def test_layers_that_mix_the_sequences_of_a_pack_are_refused(tmp_path, monkeypatch):
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) + x.cumsum(1))
    for load in (load_causal_lm, new_reward_model):
        with pytest.raises(ValueError, match="packed it computes something else"):
            load(save(tmp_path, "llama"))


def test_attention_with_sinks_is_refused(tmp_path):
    folder = save(tmp_path, "gpt_oss", head_dim=8, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="GptOssAttention wants s_aux"):
        load_causal_lm(folder)


@pytest.mark.parametrize(
    "changes", [{"final_logit_softcapping": 0.1}, {"logit_scale": 3.0, "arch": "cohere"}, {"arch": "gemma2"}]
)
def test_heads_that_scale_or_cap_are_reproduced(tmp_path, changes):
    arch = {"arch": "gemma3_text", **changes}["arch"]
    changes = {name: value for name, value in changes.items() if name != "arch"}
    if arch == "gemma2":
        changes = {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 8, "attn_logit_softcapping": 0.1}
    folder = save(tmp_path, arch, **changes)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = sequences((30,))[0]
    logprobs = Policy.from_pretrained(folder)(pack([tokens], prompt_lengths=[1]))
    rows = plain(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
    expected = rows.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].float()
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


def test_a_folder_without_all_the_weights_is_refused(tmp_path):
    new_reward_model(save(tmp_path, "llama")).save_pretrained(tmp_path / "rm")
    with pytest.raises(ValueError, match=r"rm lacks the weights \['lm_head.weight'\] of LlamaForCausalLM"):
        Policy.from_pretrained(tmp_path / "rm")


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])


def change_config(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


@pytest.mark.parametrize("load", [Policy.from_pretrained, new_reward_model])
@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (cut_weights, "SafetensorError"),
        (change_config(hidden_size=64), "RuntimeError"),
        (change_config(model_type="frobnicate"), "frobnicate"),
        (change_config(model_type="t5", architectures=["T5ForConditionalGeneration"]), "Unrecognized configuration"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_named_with_the_reason(tmp_path, load, break_it, text):
    folder = save(tmp_path, "llama")
    break_it(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^model: cannot load '{folder}' as Auto.*{text}"):
        load(folder)


def test_a_body_without_a_classifier_in_transformers_is_named(tmp_path):
    folder = save(tmp_path, "cohere")
    with pytest.raises(ValueError, match="transformers has none with a cohere body"):
        new_reward_model(folder)


def test_a_token_that_is_also_padding_is_trained_and_scored_like_any_other(tmp_path):
    folder = save(tmp_path, "llama", pad_token_id=1, eos_token_id=1)
    policy = Policy.from_pretrained(folder)
    tokens = [[5, 6, 1, 7, 1]]
    policy(pack(tokens, prompt_lengths=[1])).sum().backward()
    assert policy.model.get_input_embeddings().weight.grad[1].any()
    reward_model = new_reward_model(folder)
    reward_model.save_pretrained(tmp_path / "rm")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    torch.testing.assert_close(reward_model(pack(tokens)), plain(torch.tensor(tokens)).logits[:, 0], atol=1e-5, rtol=0)


def test_a_model_object_is_taken_as_it_is_also_twice(tmp_path):
    model = tiny_model("llama", VOCAB)
    weight = model.lm_head.weight
    again = load_causal_lm(load_causal_lm(model, gradient_checkpointing=True))
    assert again is model and again.lm_head.weight is weight


def test_a_frozen_model_asks_for_no_gradient(tmp_path):
    folder = save(tmp_path, "llama")
    frozen = new_reward_model(folder, freeze=True)
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.model.training
    assert all(p.requires_grad for p in ValueModel.from_reward_model(frozen).parameters())


def test_parameters_lie_in_aligned_memory(tmp_path):
    for model in (Policy.from_pretrained(save(tmp_path, "gpt2")), new_reward_model(tmp_path / "gpt2")):
        assert all(p.data_ptr() % 64 == 0 for p in filled(model.parameters()))


def test_autocast_runs_the_body_in_bfloat16_and_the_head_in_float32(tmp_path):
    folder, batch = save(tmp_path, "qwen3"), pack(sequences(), prompt_lengths=[1] * 4)
    exact = Policy.from_pretrained(folder)(batch)
    policy = Policy.from_pretrained(folder, autocast=torch.bfloat16, gradient_checkpointing=True).train()
    logprobs = policy(batch)
    assert logprobs.dtype == torch.float32 and not torch.equal(logprobs, exact)
    torch.testing.assert_close(logprobs, exact, atol=0.05, rtol=0)
    logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.parameters())


def test_tiny_tokenizer_round_trips():
    tokenizer = tiny_tokenizer(VOCAB)
    assert tokenizer.decode(tokenizer("Grüße!").input_ids) == "Grüße!"
