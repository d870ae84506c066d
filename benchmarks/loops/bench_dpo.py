"""DPO: our loop, and TRL's DPOTrainer, whose reference model runs beside the policy in every step.

One epoch over 32 pairs of HH-RLHF lengths (task.py), 4 a step, in the same order, from the same weights, which are the
reference's too, with the same optimizer; losses must agree step by step. Our time is that of the steps and of the one
pass of the reference before them. Real tokens, and operations in the share of the matrix rate, count a prompt once for
each of its two responses on both sides; ours reads it once for both.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import llama
from benchmarks.loops import sides, task, training

RTOL = 1e-4  # of losses, which are of differences of sums of log-probabilities
BETA = 0.1


def fastrlhf(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from fastrlhf.settings.training import DPOConfig
    from fastrlhf.trainers.dpo import DPO

    settings = training.our_options(options, folder) | {"batch_size": options.batch // 2, "beta": BETA}
    trainer = DPO(DPOConfig(model=str(folder / "model"), data=str(folder / "pairs.jsonl"), **settings))
    with training.Clock() as clock:  # what was done once already, now without the loading
        trainer.logprobs_of(trainer.model, trainer.rows)
    found = training.train_ours(trainer)
    return {**found, "seconds": found["seconds"] + clock.seconds, "reference_seconds": clock.seconds}


def trl(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model, reference = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32") for _ in range(2))
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(
            **training.trainer_options(options, folder),
            beta=BETA,
            per_device_train_batch_size=options.batch // 2,
            max_length=task.MAX_LENGTH,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list(task.read(folder / "ordered_pairs.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    rows = trainer.train_dataset
    prompts, *responses = (sum(map(len, rows[column])) for column in rows.column_names if column.endswith("_ids"))
    return {**training.train_theirs(trainer), "tokens": 2 * prompts + sum(responses)}


def main() -> None:
    from transformers import AutoTokenizer

    from fastrlhf.data import batch_rows

    report = sides.begin("dpo", sides.OPTIONS)
    options = report.options
    with sides.made(options, "model") as folder:
        pairs = task.read(folder / "pairs.jsonl")
        ordered = [pairs[i] for i in batch_rows(len(pairs), len(pairs), 0, seed=0)]
        task.write(folder / "ordered_pairs.jsonl", ordered)
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        prompts = [len(tokenizer(pair["prompt"]).input_ids) for pair in pairs for _ in range(2)]
        answers = [len(tokenizer(pair[side]).input_ids) + 1 for pair in pairs for side in ("chosen", "rejected")]
        runs = sides.alternate(sides.pythons(options.trl), options, folder)
        config, lengths = (
            llama.config(task.SHAPES[options.shape]),
            [p + a for p, a in zip(prompts, answers, strict=True)],
        )
        operations = 4 * sides.forward_operations(config, lengths, sum(answers))
        error = sides.expect_equal_losses(runs, RTOL, options.device)
        sides.add(report, f"{options.shape}, {len(pairs)} pairs", runs, operations, loss_error=error)
    report.finish()


if __name__ == "__main__":
    sides.run(main, {"fastrlhf": fastrlhf, "trl": trl})
