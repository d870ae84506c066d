"""Reward modelling: our loop beside TRL's RewardTrainer, or, where TRL is missing, a padded loop of transformers.

One epoch over 32 pairs of HH-RLHF lengths (task.py), 4 a step, in the same order, from the same weights, with the same
optimizer; losses must agree step by step. Real tokens, and operations in the share of the matrix rate, count a prompt
once for each of its two responses on all sides; ours reads it once for both, where that leaves the scores as they are,
and once for each in "prompts apart". tokens_computed: on which the model was run.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import llama
from benchmarks.loops import sides, task, training

APART = "fastrlhf, prompts apart"
RTOL = 1e-4  # of losses, which are of differences of scores: rounding in another order makes 1e-6 of it


def fastrlhf(options: argparse.Namespace, folder: Path, *, share_prompts: bool = True) -> dict[str, Any]:
    from fastrlhf.settings.training import RewardConfig
    from fastrlhf.trainers.reward import RewardTrainer

    settings = training.our_options(options, folder) | {"center_bias": False, "batch_size": options.batch // 2}
    settings |= {"model": str(folder / "reward"), "data": str(folder / "pairs.jsonl"), "share_prompts": share_prompts}
    trainer = RewardTrainer(RewardConfig(**settings))
    computed = sum(map(trainer.num_forward_tokens, trainer.rows))
    return {**training.train_ours(trainer), "computed": computed}


def trl(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    pairs = task.read(folder / "ordered_pairs.jsonl")
    both = [{side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")} for pair in pairs]
    trainer = RewardTrainer(
        model=str(folder / "reward"),
        args=RewardConfig(
            **training.trainer_options(options, folder),
            per_device_train_batch_size=options.batch // 2,
            max_length=task.MAX_LENGTH,
            train_sampling_strategy="sequential",
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list(both),
        processing_class=AutoTokenizer.from_pretrained(folder / "reward"),
    )
    columns = [column for column in trainer.train_dataset.column_names if column.endswith("_ids")]
    tokens = sum(len(row) for column in columns for row in trainer.train_dataset[column])
    return {**training.train_theirs(trainer), "tokens": tokens}


def padded(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    load = AutoModelForSequenceClassification.from_pretrained
    model = load(folder / "reward", dtype=torch.float32).to(options.device).train()
    rows = tokens_of(task.read(folder / "ordered_pairs.jsonl"), AutoTokenizer.from_pretrained(folder / "reward"))

    def loss_of(batch: list[list[int]]) -> torch.Tensor:
        ids, mask = training.right_padded(batch, options.device)
        scores = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float()
        return -F.logsigmoid(scores[0::2] - scores[1::2]).mean()

    batches = [rows[i : i + options.batch] for i in range(0, len(rows), options.batch)]
    return {**training.train_plainly(model, batches, loss_of, options.device), "tokens": sum(map(len, rows))}


def tokens_of(pairs: list[dict[str, str]], tokenizer: Any) -> list[list[int]]:
    """The tokens of chosen and rejected in turn, each with its end."""
    texts = [pair["prompt"] + pair[side] for pair in pairs for side in ("chosen", "rejected")]
    return [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]


def main() -> None:
    from transformers import AutoTokenizer

    from fastrlhf.data import batch_rows

    report = sides.begin("reward", sides.OPTIONS)
    options = report.options
    with sides.made(options, "reward") as folder:
        pairs = task.read(folder / "pairs.jsonl")
        ordered = [pairs[i] for i in batch_rows(len(pairs), len(pairs), 0, seed=0)]
        task.write(folder / "ordered_pairs.jsonl", ordered)
        lengths = list(map(len, tokens_of(pairs, AutoTokenizer.from_pretrained(folder / "reward"))))
        pythons = sides.pythons(options.trl, instead="padded") | {APART: sys.executable}
        runs = sides.alternate(pythons, options, folder)
        operations = 3 * sides.forward_operations(llama.config(task.SHAPES[options.shape]), lengths, 0)
        error = sides.expect_equal_losses(runs, RTOL, options.device)
        computed = {name: of_side[0]["computed"] for name, of_side in runs.items() if "computed" in of_side[0]}
        case = f"{options.shape}, {len(pairs)} pairs"
        sides.add(report, case, runs, operations, loss_error=error, tokens_computed=computed)
    report.finish()


if __name__ == "__main__":
    apart = partial(fastrlhf, share_prompts=False)
    sides.run(main, {"fastrlhf": fastrlhf, "trl": trl, "padded": padded, APART: apart})
