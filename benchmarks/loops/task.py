"""The task that both sides of a loop benchmark are given: model folders and files of texts. Imports nothing of ours, so
that it runs in a peer's environment too.

Without a file of pairs, texts are random words, a token each. Prompts have Gamma(1.25, 100) tokens and responses
4 + Exp(42), pairs with a side above 512 left out: fitted to the 2,000 pairs of HH-RLHF harmless that the byte-pair
vocabulary below cuts into prompts of 124 tokens on average (10, 50 and 90 %: 18, 95, 276) and responses of 46 (9, 31,
101), together 170 (41, 135, 348).
"""

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import llama

SHAPES = {
    "tiny": llama.TINY,
    "10m": llama.SMALL,
    "135m": llama.SMOLLM2_135M,
    "1.5b": llama.QWEN2_1_5B,
    "3b": llama.LLAMA3_3B,
}
SPECIAL = PAD, _, EOS = "<pad>", "<unused>", "<eos>"  # 0, 1, 2, which is llama.EOS
MAX_LENGTH = 512


def make(folder: Path, shape: str, num_pairs: int, data: str | None, kinds: tuple[str, ...]) -> None:
    """Writes the models of the given kinds (model/, reward/), with the tokenizer, and pairs, demonstrations, texts and
    prompts (JSON lines)."""
    config = llama.config(SHAPES[shape])
    raw = list(read_pairs(data)) if data else None
    tokenizer = words(config.vocab_size) if raw is None else byte_pairs(raw, config.vocab_size)
    write_models(folder, config, tokenizer, kinds)
    candidates = random_pairs(config.vocab_size - len(SPECIAL)) if raw is None else shuffled(raw)
    pairs: list[dict[str, str]] = []
    while len(pairs) < num_pairs:
        pair = next(candidates, None)
        if pair is None:
            raise SystemExit(f"{data}: only {len(pairs)} pairs of at most {MAX_LENGTH} tokens, {num_pairs} wanted")
        if all(len(tokenizer(pair["prompt"] + pair[side]).input_ids) < MAX_LENGTH for side in ("chosen", "rejected")):
            pairs.append(pair)
    sides = [{"prompt": p["prompt"], "completion": p[side]} for p in pairs for side in ("chosen", "rejected")]
    random.Random(1).shuffle(sides)
    write(folder / "pairs.jsonl", pairs)
    write(folder / "demonstrations.jsonl", sides)
    write(folder / "texts.jsonl", [{"text": side["prompt"] + side["completion"]} for side in sides])
    write(folder / "prompts.jsonl", [{"prompt": pair["prompt"]} for pair in pairs])


def write_models(folder: Path, config: Any, tokenizer: Any, kinds: tuple[str, ...]) -> None:
    """A causal language model, a reward model of the same shape, or both, with weights of their own."""
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    config.num_labels = 1
    classes = {"model": LlamaForCausalLM, "reward": LlamaForSequenceClassification}
    for seed, kind in enumerate(kinds):
        torch.manual_seed(seed)
        classes[kind](config).save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the sides' processes need it


def words(vocab_size: int) -> Any:
    """A tokenizer whose every token is a word between blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *map(str, range(vocab_size - len(SPECIAL)))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(tokenizer)


def byte_pairs(pairs: list[dict[str, str]], vocab_size: int) -> Any:
    """A byte-pair vocabulary trained on the pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((pair["prompt"] + pair["chosen"] + pair["rejected"] for pair in pairs), trainer)
    return fast(tokenizer)


def fast(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=PAD)


def random_pairs(num_words: int) -> Iterator[dict[str, str]]:
    rng = random.Random(0)

    def text(length: float) -> str:
        return "".join(f" {rng.randrange(num_words)}" for _ in range(max(int(length), 1)))

    while True:
        prompt = text(rng.gammavariate(1.25, 100))
        chosen, rejected = (text(4 + rng.expovariate(1 / 42)) for _ in range(2))
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def read_pairs(path: str) -> Iterator[dict[str, str]]:
    """The pairs of a file of HH-RLHF text whose sides have the same prompt."""
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        rows = [json.loads(line) for line in file]
    turn = "\n\nAssistant:"
    for row in rows:
        (prompt, _, chosen), (other, _, rejected) = (row[side].rpartition(turn) for side in ("chosen", "rejected"))
        if prompt == other and chosen.strip() and rejected.strip() and chosen != rejected:
            yield {"prompt": prompt + turn, "chosen": chosen.rstrip(), "rejected": rejected.rstrip()}


def shuffled(pairs: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    return iter(random.Random(0).sample(pairs, len(pairs)))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
