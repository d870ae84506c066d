"""Supervised fine-tuning: our loop beside TRL's SFTTrainer, or, where TRL is missing, a padded loop of transformers.

One epoch over 64 demonstrations of HH-RLHF lengths (task.py), 8 a step, in the same order, from the same weights, with
the same optimizer; losses must agree step by step. The loss is of responses, with --all-tokens of all but the first.

TRL runs padding_free, which trains on the same sequences a step as the others (its other packing, bfd, does not). A
step of SmolLM2's shape, ours alone, shows how near a larger model comes to the machine's rate of matrix products.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import llama
from benchmarks.loops import sides, task, training

RTOL = 1e-5  # of losses: rounding in another order makes 1e-7 of it
FILES = {"loss of responses": "demonstrations.jsonl", "loss of all tokens": "texts.jsonl"}


def fastrlhf(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from fastrlhf.settings.training import SFTConfig
    from fastrlhf.trainers.sft import SFT

    settings = training.our_options(options, folder)
    config = SFTConfig(
        model=str(folder / "model"), data=str(folder / options.file), batch_size=options.batch, **settings
    )
    return training.train_ours(SFT(config))


def trl(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings = training.trainer_options(options, folder)
    trainer = SFTTrainer(
        model=str(folder / "model"),
        args=SFTConfig(
            **settings,
            per_device_train_batch_size=options.batch,
            padding_free=True,
            max_length=None,
            train_sampling_strategy="sequential",
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list(task.read(folder / ("ordered_" + options.file))),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    return {**training.train_theirs(trainer), "tokens": tokens}


def padded(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).to(options.device).train()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [tokens_of(row, tokenizer) for row in task.read(folder / ("ordered_" + options.file))]

    def loss_of(batch: list[tuple[list[int], int]]) -> torch.Tensor:
        ids, mask = training.right_padded([tokens for tokens, _ in batch], options.device)
        place = torch.arange(ids.shape[1], device=options.device)
        starts = torch.tensor([start for _, start in batch], device=options.device)[:, None]
        labels = ids.masked_fill((mask == 0) | (place < starts), -100)[:, 1:]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    batches = [rows[i : i + options.batch] for i in range(0, len(rows), options.batch)]
    return {**training.train_plainly(model, batches, loss_of, options.device), "tokens": sum(len(r) for r, _ in rows)}


def tokens_of(row: dict[str, str], tokenizer: Any) -> tuple[list[int], int]:
    """The tokens of a row with their end, and the place of the first that is learned."""
    if "text" in row:
        return [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id], 1
    prompt = tokenizer(row["prompt"]).input_ids
    return [*prompt, *tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id], len(prompt)


def operations(config: Any, rows: list[tuple[list[int], int]]) -> float:
    """Floating-point operations of forward and backward of the real tokens, with logits where a token is learned."""
    lengths = [len(tokens) for tokens, _ in rows]
    return 3 * sides.forward_operations(config, lengths, sum(len(tokens) - start for tokens, start in rows))


def main() -> None:
    more = {"--all-tokens": {"action": "store_true", "help": "learn all tokens, not those of responses alone"}}
    report = sides.begin("sft", sides.OPTIONS | more)
    options = report.options
    compared(report, options, sides.pythons(options.trl, instead="padded"))
    if options.device == "cpu" and options.shape == "10m":  # how near the machine's limit a larger model comes
        larger = argparse.Namespace(**vars(options) | {"shape": "135m", "pairs": 4, "repeats": 2})
        compared(report, larger, {"fastrlhf": sys.executable})
    report.finish()


def compared(report: Any, options: argparse.Namespace, pythons: dict[str, str]) -> None:
    """Times the sides on a task."""
    from transformers import AutoTokenizer

    from fastrlhf.data import batch_rows

    with sides.made(options, "model") as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        what = "loss of all tokens" if options.all_tokens else "loss of responses"
        rows = task.read(folder / FILES[what])
        order = batch_rows(len(rows), len(rows), 0, seed=0)
        task.write(folder / ("ordered_" + FILES[what]), [rows[i] for i in order])
        runs = sides.alternate(pythons, options, folder, file=FILES[what])
        count = operations(llama.config(task.SHAPES[options.shape]), [tokens_of(row, tokenizer) for row in rows])
        error = sides.expect_equal_losses(runs, RTOL, options.device)
        sides.add(report, f"{options.shape}, {len(rows)} sequences, {what}", runs, count, loss_error=error)


if __name__ == "__main__":
    sides.run(main, {"fastrlhf": fastrlhf, "trl": trl, "padded": padded})
