"""Tiny random models and a tokenizer, made on the spot: tests download nothing."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gpt_neox", "gpt2", "gemma3_text")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_model(arch="llama", vocab=300, *, dtype=torch.float32, **changes):
    """A random 2-layer model of width 32 with 4 heads (2 key-value heads where the architecture has such)."""
    common = {"vocab_size": vocab, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    if arch == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        }
        if arch != "gpt_neox":
            sizes["num_key_value_heads"] = 2
        if arch in ("qwen3", "gemma3_text"):
            sizes["head_dim"] = 8
        if arch == "mistral":
            sizes["sliding_window"] = 8
        if arch == "gemma3_text":
            sizes.update(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    config = AutoConfig.for_model(arch, **{**common, **sizes, **changes})
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def tiny_tokenizer(vocab=300, *, chat=True, pad_is_eos=False):
    """A byte-level tokenizer of `vocab` ids: <pad>, <eos>, 256 bytes, and fillers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", *alphabet]
    if vocab < len(names):
        raise ValueError(f"tiny_tokenizer: vocab must be at least {len(names)}, got {vocab}")
    names += [f"<filler{i}>" for i in range(vocab - len(names))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>" if pad_is_eos else "<pad>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]})
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast
