"""Conversations, and what a tokenizer makes of them; tokenizers as SentencePiece makes them."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from fastrlhf.data.rendering import DATE
from fastrlhf.data.template import load_tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
PLAIN = [user("What is two plus two?"), assistant("It is 4.")]
TALKS = {
    "plain": PLAIN,
    "turns": [user("Hello"), assistant("Hello there!\n\nHi"), *PLAIN],
    "inner": [user("Is  it\n 4? ä😀"), assistant("Yes.\n\n- it is\n\n ä😀 <b>4</b>")],
    "system": [SYSTEM, *PLAIN],
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOL = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
}
WITH_TOOLS = [
    user("2 + 2?"),
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "4"},
    assistant("It is 4."),
]


def rendered(tokenizer, messages, **options):
    """What transformers makes of a conversation; templates that ask for the date are given ours."""
    text = tokenizer.chat_template.replace("strftime_now('%Y-%m-%d')", "'2024-07-26'")
    text = text.replace('strftime_now("%Y-%m-%d")', "'2024-07-26'").replace('strftime_now("%d %b %Y")', "'26 Jul 2024'")
    return tokenizer.apply_chat_template(messages, chat_template=text, return_dict=False, date_string=DATE, **options)


def learned(tokenizer, tokens):
    return [tokenizer.decode(tokens.ids[start:stop]) for _, start, stop in tokens.turns]


ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def sentencepiece_like():
    """A tokenizer whose texts begin with a space of its own, as Llama 2's."""
    letters = [chr(n) for n in range(33, 127)]
    names = [
        "<unk>",
        "<s>",
        "</s>",
        "▁",
        *(f"<0x{n:02X}>" for n in range(256)),
        *letters,
        "▁a",
        "▁Blue",
        "Bl",
        "ue",
        "Blue",
    ]
    merges = [("▁", "a"), ("B", "l"), ("u", "e"), ("Bl", "ue"), ("▁", "Blue")]
    vocabulary = {name: n for n, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def mistral(folder):
    """The vocabulary of Mistral 7B v0.1, from the package mistral-common."""
    vocabulary = Path(sys.prefix) / "vocabularies/mistral_common/data/tokenizer.model.v1"  # make puts it there
    if not vocabulary.is_file() or importlib.util.find_spec("sentencepiece") is None:
        pytest.skip(f"needs sentencepiece and {vocabulary}")
    shutil.copy(vocabulary, folder / "tokenizer.model")
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder / "saved")
    return load_tokenizer(folder / "saved")
