"""Llama models with random weights, in the shapes of ones that people train."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

EOS = 2
# hidden size, intermediate size, layers, heads, heads of keys, vocabulary
TINY = (32, 64, 2, 2, 1, 64)
SMALL = (256, 704, 8, 4, 4, 8192)  # 10.6 million parameters
SMOLLM2_135M = (576, 1536, 30, 9, 3, 49152)
QWEN2_1_5B = (1536, 8960, 28, 12, 2, 151936)
LLAMA3_3B = (3072, 8192, 28, 24, 8, 128256)


def config(shape: tuple[int, ...]) -> LlamaConfig:
    """The model's; head and embeddings are one tensor where they would be half of it."""
    hidden, inner, layers, heads, kv_heads, vocab = shape
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=vocab > 8192,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=EOS,
    )


def make(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config(shape), dtype=dtype)
