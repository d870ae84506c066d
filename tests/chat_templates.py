"""Chat templates of published models, each with a small tokenizer that has its control tokens."""

import functools
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "fixtures" / "chat_templates"
CONTROL = re.compile(
    r"<\|[^|<>\s'\"{}]{1,40}\|?>|<\uff5c[^\uff5c<>\s]{1,40}\uff5c>|<[a-z_]+\|>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>|</s>"
)
ENDS = re.compile(r"im_end|end_of_turn|eot|end▁of▁sentence|END_RESPONSE|\|end\||\|return\||</s>|^<turn\|>|\|endoftext")
TEXTS = "Hello there!\n\nHow are you?\n\n<think>\n\n</think>\n\nassistant\nuser: two plus two is four. What is it?\n"


def names(training=False):
    found = {path.stem.removesuffix("_training") for path in FOLDER.glob("*_training.jinja")}
    return sorted(
        found if training else {path.stem for path in FOLDER.glob("*.jinja")} - {f"{n}_training" for n in found}
    )


def template(name):
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def tokenizer_of(name):
    """A byte-level BPE tokenizer; <think> and </think> are added tokens that are not special, as Qwen has them."""
    text = template(name)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = sorted(set(CONTROL.findall(text)) - {"<think>", "</think>"})
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=letters, special_tokens=["<bos_>", "<eos_>"])
    tokenizer.train_from_iterator([TEXTS] * 50, trainer)
    eos = next((token for token in special if ENDS.search(token)), "<eos_>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos_>", eos_token=eos, pad_token="<eos_>")
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.add_tokens(["<think>", "</think>"])
    fast.chat_template = text
    return fast
