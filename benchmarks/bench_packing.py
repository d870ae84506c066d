"""Packed training against padding: forward and backward of one SFT batch, every token but a sequence's first a target.

A random Llama of 10.6 million parameters and 24 sequences; on a GPU larger ones, under autocast to bfloat16. Their
lengths are those of HH-RLHF harmless with SmolLM2's tokenizer: log-normal, exp(N(4.80, 0.79)) tokens cut to 16 .. 512
(of 2000 rows: geometric mean 122, mean 164, 2 % above 512); with --data they are those of the file, its characters
divided by 3.96, in the file's order.

Packed: our attention and head, micro-batches of 1024 tokens (8192 on a GPU). Padded: transformers' sdpa attention,
right padding, micro-batches of 8 (16) in random order or sorted by length, cross-entropy over the padded logits.
"""

import copy
import gzip
import json
import math
from itertools import islice

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from benchmarks import llama
from benchmarks.case import expect_close, peak_mib
from benchmarks.harness import Report, compare
from fastrlhf.models.policy import Policy, load_causal_lm
from fastrlhf.packing import pack

CHARACTERS_PER_TOKEN = 3.96
PACK_TOKENS, BATCH = {"cpu": 1024, "cuda": 8192}, {"cpu": 8, "cuda": 16}
SIZES = {  # of the model, and sequences
    "cpu": [(*llama.SMALL, 24)],
    "cuda": [(*llama.SMOLLM2_135M, 256), (*llama.QWEN2_1_5B, 128)],
    "tiny": [(*llama.TINY, 3)],
}


def lengths_of(path: str | None, num: int) -> list[int]:
    if path is None:
        lengths = (torch.randn(num, device="cpu") * 0.79 + 4.80).exp().round().long().clamp(16, 512)
        return lengths.tolist()
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        texts = [json.loads(line)["chosen"] for line in islice(file, num)]
    return [min(max(math.ceil(len(text) / CHARACTERS_PER_TOKEN), 16), 512) for text in texts]


def padded(model: PreTrainedModel, sequences: list[list[int]], num_targets: int) -> torch.Tensor:
    """Accumulates the gradients of the mean cross-entropy; returns it."""
    device, total = model.device, torch.zeros((), device=model.device)
    for start in range(0, len(sequences), BATCH[device.type]):
        rows = sequences[start : start + BATCH[device.type]]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / num_targets
        loss.backward()
        total += loss.detach()
    return total


def packed(policy: Policy, sequences: list[list[int]], num_targets: int) -> torch.Tensor:
    """The same loss and gradients."""
    device = policy.model.device
    total, batch = torch.zeros((), device=device), pack(sequences, prompt_lengths=[1] * len(sequences), device=device)
    for part in batch.microbatches(PACK_TOKENS[device.type]):
        loss = -policy(part).sum() / num_targets
        loss.backward()
        total += loss.detach()
    return total


def expect_equal_gradients(ours: PreTrainedModel, theirs: PreTrainedModel, most: float) -> float:
    """Returns the largest difference of a parameter's gradients, relative to their norm; raises if above `most`."""
    of_theirs, worst = dict(theirs.named_parameters()), 0.0
    for name, parameter in ours.named_parameters():
        expected = of_theirs[name].grad
        error = float((parameter.grad - expected).norm() / expected.norm())
        if not error <= most:
            raise AssertionError(f"the gradient of {name} differs by {error:.3g}, more than {most}")
        worst = max(worst, error)
    return worst


def measure(report: Report, shape: tuple[int, ...], num_sequences: int) -> None:
    device, near = report.options.device, 1e-5 if report.options.device == "cpu" else 0.1
    lengths = lengths_of(report.options.data, num_sequences)
    sequences = [torch.randint(3, shape[-1], (n,)).tolist() for n in lengths]
    theirs = llama.make(shape, device).train()
    ours = load_causal_lm(copy.deepcopy(theirs), device=device)
    policy = Policy(ours, autocast=None if device == "cpu" else torch.bfloat16).train()
    by_length, num_targets = sorted(sequences, key=len), sum(lengths) - len(lengths)

    losses = packed(policy, sequences, num_targets), padded(theirs, sequences, num_targets)
    expect_close("loss", *losses, rtol=near, atol=0)
    error = expect_equal_gradients(ours, theirs, near)
    functions = {
        "fastrlhf, packed": lambda: packed(policy, sequences, num_targets),
        "padded, random order": lambda: padded(theirs, sequences, num_targets),
        "padded, sorted by length": lambda: padded(theirs, by_length, num_targets),
    }
    memory = {name: peak_mib(function) for name, function in functions.items()}
    timings = compare(functions, seconds=report.options.seconds, min_rounds=3)
    tokens = {name: sum(lengths) / timing.median * 1e3 for name, timing in timings.items()}
    case = f"{len(lengths)} sequences, {sum(lengths)} tokens" + f", {shape[0]} wide" * (device == "cuda")
    report.add(case, timings, tokens_per_s=tokens, peak_mib=memory, gradient_error={"fastrlhf, packed": error})


def main() -> None:
    data = {"--data": {"help": "JSON lines, .gz or not, whose `chosen` texts give the lengths"}}
    report = Report("packing", SIZES, data)
    torch.set_default_device(None)  # what is not of the model is made on the CPU, as in training
    for *shape, num_sequences in report.sizes:
        measure(report, tuple(shape), num_sequences)
    report.finish()


if __name__ == "__main__":
    main()
