"""pytest plugin, in TRL's tests: stands in for the model hub, offline.

Models named trl-internal-testing/tiny-CLASS are made from a small configuration with random weights, their tokenizer is
trained on the spot, and the data sets trl-internal-testing/zen are made up. Tests that need a real checkpoint, images
or vLLM still fail.
"""

import functools
import os
import re
import tempfile

import datasets
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.auto_factory import _BaseAutoModelClass

CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
FOLDER = tempfile.mkdtemp(prefix="peer_hub_")
QUESTIONS = ("Beautiful is better than", "Explicit is", "Simple is better", "Now is better", "Flat is better than")
ANSWERS = (" ugly.", " better than implicit.", " than complex.", " than never.", " nested.")
WORSE = (" the moon.", " worse than nothing.", " not.", " later.", " round.")
NUM_ROWS = 17


@functools.cache
def tokenizer():
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([*QUESTIONS, *ANSWERS, *WORSE] * 4, vocab_size=400, show_progress=False)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    made.add_special_tokens(SPECIAL)
    made.chat_template = CHAT
    return made


@functools.cache
def local(name):
    """The folder of a stand-in for a model of the hub, or None."""
    named = re.match(r"trl-internal-testing/tiny-([A-Za-z0-9]+)", name)
    model = getattr(transformers, named.group(1), None) if named else None
    if getattr(model, "config_class", None) is None:
        return None
    folder = os.path.join(FOLDER, name.split("/")[-1])
    text = tokenizer()
    text.save_pretrained(folder)
    size = {"vocab_size": len(text), "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"pad_token_id": text.pad_token_id, "eos_token_id": text.eos_token_id, "bos_token_id": 1}
    labels = {"num_labels": 1} if named.group(1).endswith("SequenceClassification") else {}
    torch.manual_seed(0)
    model(model.config_class(**size, **ids, **labels)).save_pretrained(folder)
    return folder


def redirect(owner):
    original = owner.__dict__["from_pretrained"].__func__

    @functools.wraps(original)
    def from_pretrained(cls, name, *args, **kwargs):
        folder = local(str(name))
        if folder:
            kwargs.pop("revision", None)
        return original(cls, folder or name, *args, **kwargs)

    owner.from_pretrained = classmethod(from_pretrained)


def rows(config):
    """The rows of a configuration of zen, such as conversational_preference."""
    conversational, kind = config.startswith("conversational"), config.split("_", 1)[1]

    def said(role, text):
        return [{"role": role, "content": text.strip()}] if conversational else text

    made = []
    for i in range(NUM_ROWS):
        prompt = said("user", QUESTIONS[i % 5] + " " * (i // 5))
        good, bad = said("assistant", ANSWERS[i % 5]), said("assistant", WORSE[i % 5])
        made.append(
            {
                "language_modeling": {"messages" if conversational else "text": prompt + good},
                "prompt_only": {"prompt": prompt},
                "prompt_completion": {"prompt": prompt, "completion": good},
                "preference": {"prompt": prompt, "chosen": good, "rejected": bad},
                "implicit_prompt_preference": {"chosen": prompt + good, "rejected": prompt + bad},
                "unpaired_preference": {"prompt": prompt, "completion": (bad, good)[i % 2], "label": bool(i % 2)},
            }[kind]
        )
    return made


def load_dataset(path, name=None, *args, split=None, **kwargs):
    if path != "trl-internal-testing/zen" or not name:
        return from_hub(path, name, *args, split=split, **kwargs)
    made = datasets.Dataset.from_list(rows(name))
    return made if split else datasets.DatasetDict(train=made, test=made)


for owner in (PreTrainedModel, PretrainedConfig, AutoTokenizer, AutoConfig, _BaseAutoModelClass):
    redirect(owner)
from_hub = datasets.load_dataset
datasets.load_dataset = load_dataset
