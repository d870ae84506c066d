"""Packed models against transformers itself, padded and one sequence at a time."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPTJConfig, GPTJForCausalLM

from fastrlhf.models import Policy, RewardModel, ValueModel, load_causal_lm
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


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_reward_model_folder_gives_the_same_scores_in_plain_transformers(tmp_path, arch):
    reward_model = RewardModel.from_pretrained(save(tmp_path, arch))
    reward_model.bias = 0.25
    reward_model.save_pretrained(tmp_path / "rm")
    tokens = sequences()
    scores = RewardModel.from_pretrained(tmp_path / "rm")(pack(tokens))
    assert torch.equal(scores, reward_model(pack(tokens)))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    expected = torch.stack([plain(torch.tensor([s])).logits[0, 0] for s in tokens]) + 0.25
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_values_before_the_first_response_token_equal_the_score_of_the_prompt(tmp_path):
    reward_model = RewardModel.from_pretrained(save(tmp_path, "llama"))
    reward_model.bias = -1.5
    value_model = ValueModel.from_reward_model(reward_model)
    tokens = sequences((9, 14))
    values = value_model(pack(tokens, prompt_lengths=[4, 6]))
    for n, (sequence, first, prompt) in enumerate(zip(tokens, (0, 5), (4, 6), strict=True)):
        for t in range(prompt, len(sequence)):
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


def test_a_model_that_is_not_on_the_attention_interface_is_refused(tmp_path):
    config = GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    GPTJForCausalLM(config).save_pretrained(tmp_path / "gptj")
    with pytest.raises(ValueError, match="GPTJForCausalLM is not on"):
        load_causal_lm(tmp_path / "gptj")


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="/no/such/model"):
        load_causal_lm("/no/such/model")


def test_a_classifier_with_several_labels_is_no_reward_model(tmp_path):
    config = tiny_model("llama", VOCAB).config
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="must have 1 label, got 3"):
        RewardModel.from_pretrained(tmp_path / "three")


def test_head_that_scales_its_logits_unknown_to_us_is_refused(tmp_path, monkeypatch):
    folder = save(tmp_path, "llama")
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 3
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ValueError, match="LlamaForCausalLM: packed it computes something else"):
        load_causal_lm(folder)


def test_tiny_tokenizer_round_trips():
    tokenizer = tiny_tokenizer(VOCAB)
    assert tokenizer.decode(tokenizer("Grüße!").input_ids) == "Grüße!"
