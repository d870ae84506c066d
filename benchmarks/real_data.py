"""What a small reward model learns of real data: held-out accuracy, with its interval.

    python -m benchmarks.real_data --data FOLDER --tokenizer SMOLLM2

A Llama of 2 layers, 64 wide, with random weights and SmolLM2's tokenizer; one epoch each, on one thread, the last fifth
of the rows held out. FOLDER holds hh_harmless.jsonl.gz (pairs of HH-RLHF), oasst_en_100_trees.jsonl.gz and
gsm8k_model_solutions.jsonl.gz, the two as they were published. docs/reward.md shows what came out.
"""

import argparse
import csv
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastrlhf import RewardConfig, RewardTrainer
from fastrlhf.cli.main import main as fastrlhf

RESULTS = Path(__file__).parent / "results/cpu/reward_models"
SETTINGS = {"learning_rate": 1e-3, "max_length": 2048, "eval_fraction": 0.2, "device": "cpu", "save_every": 0}
RUNS = {  # by name: file, format to convert from, further settings
    "HH-RLHF, pairs": ("hh_harmless", None, {"batch_size": 32}),
    "OASST, plackett_luce": ("oasst_en_100_trees", "oasst", {"batch_size": 16, "objective": "plackett_luce"}),
    "OASST, all_pairs": ("oasst_en_100_trees", "oasst", {"batch_size": 16, "objective": "all_pairs"}),
    "GSM8K, outcome": ("gsm8k_model_solutions", "gsm8k", {"batch_size": 32}),
}


def write_model(folder: Path, tokenizer: str) -> None:
    """A model with random weights, and the tokenizer."""
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    ids = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    config = LlamaConfig(vocab_size=len(tokens), tie_word_embeddings=True, **ids, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)


def measure(name: str, data: Path, folder: Path) -> dict[str, Any]:
    """Trains on a file; returns the figures of the held-out rows and the tokens of the run."""
    stem, source, settings = RUNS[name]
    path = data / f"{stem}.jsonl.gz"
    if source is not None:
        out = folder / f"{stem}.jsonl"
        if not out.exists():
            fastrlhf(["data", "convert", str(path), str(out), "--format", source])
        path = out
    output = folder / name.replace(", ", "-")
    config = RewardConfig(model=str(folder / "model"), data=str(path), output=str(output), **SETTINGS, **settings)
    trainer = RewardTrainer(config)
    metrics = list(trainer)[-1]
    figures = {key: metrics.get(f"eval/{key}") for key in ("accuracy", "accuracy_low", "accuracy_high", "common")}
    rows = [*trainer.rows, *trainer.held_out]
    computed, apart = (sum(map(count, rows)) for count in (trainer.num_computed, trainer.num_tokens))
    figures |= {"tokens_computed": computed, "tokens_apart": apart}
    return {"run": name, "rows": len(rows), **figures, **as_pairs(rows)}


def as_pairs(rows: list[Any]) -> dict[str, int | None]:
    """Of rankings: how many pairs of different rank they hold, and the tokens of these, with a prompt once for both
    responses of a pair and with it for each."""
    if not hasattr(rows[0], "ranks"):
        return dict.fromkeys(("pairs", "tokens_of_pairs", "tokens_of_pairs_apart"))
    pairs = [
        (len(row.prompt), len(row.responses[i]) + len(row.responses[j]))
        for row in rows
        for i, j in combinations(range(len(row.ranks)), 2)
        if row.ranks[i] != row.ranks[j]
    ]
    once, twice = (sum(times * prompt + both for prompt, both in pairs) for times in (1, 2))
    return {"pairs": len(pairs), "tokens_of_pairs": once, "tokens_of_pairs_apart": twice}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of SmolLM2-135M-Instruct")
    options = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        write_model(Path(temporary) / "model", options.tokenizer)
        rows = [measure(name, options.data, Path(temporary)) for name in RUNS]
    with (RESULTS / "real_data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
