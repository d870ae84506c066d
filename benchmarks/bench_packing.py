"""Packed training against padding: forward and backward of one SFT batch, every token but a sequence's first a target.

A random Llama of 10.6 million parameters, 24 sequences. Their lengths are those of HH-RLHF harmless with SmolLM2's
tokenizer: log-normal, exp(N(4.80, 0.79)) tokens cut to 16 .. 512 (of 2000 rows: geometric mean 122, mean 164, 2 % above
512); with --data they are those of the file, its characters divided by 3.96, in the file's order.

Packed: our attention and head, micro-batches of 1024 tokens. Padded: transformers' sdpa attention, right padding,
micro-batches of 8 in random order or sorted by length, cross-entropy over the padded logits.
"""

import copy
import gzip
import json
import math
from itertools import islice

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Report, compare, expect_close
from fastrlhf.models import Policy, load_causal_lm
from fastrlhf.packing import pack

NUM_SEQUENCES, VOCAB, CHARACTERS_PER_TOKEN = 24, 8192, 3.96
PACK_TOKENS, BATCH = 1024, 8


def lengths_of(path: str | None) -> list[int]:
    if path is None:
        lengths = (torch.randn(NUM_SEQUENCES) * 0.79 + 4.80).exp().round().long().clamp(16, 512)
        return lengths.tolist()
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        texts = [json.loads(line)["chosen"] for line in islice(file, NUM_SEQUENCES)]
    return [min(max(math.ceil(len(text) / CHARACTERS_PER_TOKEN), 16), 512) for text in texts]


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def padded(model: LlamaForCausalLM, sequences: list[list[int]], num_targets: int) -> torch.Tensor:
    """Accumulates the gradients of the mean cross-entropy; returns it."""
    total = torch.zeros(())
    for start in range(0, len(sequences), BATCH):
        rows = sequences[start : start + BATCH]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_targets
        loss.backward()
        total += loss.detach()
    return total


def packed(policy: Policy, sequences: list[list[int]], num_targets: int) -> torch.Tensor:
    """The same loss and gradients."""
    total = torch.zeros(())
    for part in pack(sequences, prompt_lengths=[1] * len(sequences)).microbatches(PACK_TOKENS):
        loss = -policy(part).sum() / num_targets
        loss.backward()
        total += loss.detach()
    return total


def main() -> None:
    report = Report(
        "packing", more={"--data": {"help": "JSON lines, .gz or not, whose `chosen` texts give the lengths"}}
    )
    lengths = lengths_of(report.options.data)
    sequences = [torch.randint(3, VOCAB, (n,)).tolist() for n in lengths]
    theirs = make_model().train()
    policy = Policy(load_causal_lm(copy.deepcopy(theirs))).train()
    by_length, num_targets = sorted(sequences, key=len), sum(lengths) - len(lengths)

    expect_close("loss", packed(policy, sequences, num_targets), padded(theirs, sequences, num_targets))
    ours_of, error = dict(policy.model.named_parameters()), 0.0
    for name, parameter in theirs.named_parameters():
        error = max(error, expect_close(name, ours_of[name].grad, parameter.grad))

    functions = {
        "fastrlhf, packed": lambda: packed(policy, sequences, num_targets),
        "padded, random order": lambda: padded(theirs, sequences, num_targets),
        "padded, sorted by length": lambda: padded(theirs, by_length, num_targets),
    }
    timings = compare(functions, seconds=report.options.seconds, min_rounds=3)
    tokens = {name: sum(lengths) / timing.median * 1e3 for name, timing in timings.items()}
    case = f"{len(lengths)} sequences, {sum(lengths)} tokens"
    report.add(case, timings, tokens_per_s=tokens, gradient_error={"fastrlhf, packed": error})
    report.finish()


if __name__ == "__main__":
    main()
