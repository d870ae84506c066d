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

SHAPES: dict[str, dict[str, Any]] = {  # of Llama models with random weights: sizes of the names behind them
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "10m": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4},
    "135m": {  # SmolLM2-135M
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1.5b": {  # Qwen2.5-1.5B
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "3b": {  # Llama-3.2-3B
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}
PAD, EOS, MAX_LENGTH = "<pad>", "<eos>", 512


def make(folder: Path, shape: str, num_pairs: int, data: str | None) -> None:
    """Writes model/, reward/ (each with the tokenizer), pairs, demonstrations, texts and prompts (JSON lines)."""
    config = llama(shape)
    raw = list(read_pairs(data)) if data else None
    tokenizer = words(config.vocab_size) if raw is None else byte_pairs(raw, config.vocab_size)
    write_models(folder, config, tokenizer)
    candidates = random_pairs(config.vocab_size - 2) if raw is None else shuffled(raw)
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


def llama(shape: str) -> Any:
    """The configuration of a shape."""
    from transformers import LlamaConfig

    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return LlamaConfig(**{"vocab_size": 8192, "max_position_embeddings": 1024, **ids, **SHAPES[shape]})


def write_models(folder: Path, config: Any, tokenizer: Any) -> None:
    """The causal language model, and a reward model of the same shape, with weights of their own."""
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    for name in ("model", "reward"):
        tokenizer.save_pretrained(folder / name)


def words(vocab_size: int) -> Any:
    """A tokenizer whose every token is a word between blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {name: i for i, name in enumerate([PAD, EOS, *map(str, range(vocab_size - 2))])}
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
        vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
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
