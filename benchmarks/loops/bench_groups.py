"""One iteration of GRPO, several responses to each prompt: our loop, beside the GRPOTrainer of TRL 1.16.

2 prompts of HH-RLHF lengths (task.py), 8 responses of 64 new tokens to each, one optimizer step, k3 to a reference in
the loss; the reward is the share of even tokens. Ours reads a prompt once for its responses (the reference too), and
once with each in "prompts apart": entropy and norm of the gradient of the two must agree. tokens_computed: on which the
update is run. TRL draws other responses to the same prompts; its losses are compared in tests/peers/trainers.py.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import llama
from benchmarks.loops import sides, task, training

APART = "fastrlhf, prompts apart"
NUM_PROMPTS, SAMPLES, NEW_TOKENS, KL_COEF = 2, 8, 64, 0.04
RTOL = 1e-4
PHASES = ("generate_seconds", "score_seconds", "update_seconds")
CHECKED = ("ppo/policy/entropy", "ppo/policy/grad_norm")


def share_of_even(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """Ours calls the tokens response_ids, TRL completion_ids."""
    rows = columns.get("response_ids") or columns["completion_ids"]
    return [sum(token % 2 == 0 for token in row) / max(len(row), 1) for row in rows]


def fastrlhf(options: argparse.Namespace, folder: Path, *, share_prompts: bool = True) -> dict[str, Any]:
    from fastrlhf.settings.ppo import PPOConfig
    from fastrlhf.trainers.ppo.trainer import PPO

    trainer = PPO(
        PPOConfig(
            model=str(folder / "model"),
            reward=share_of_even,
            data=str(folder / "prompts.jsonl"),
            **training.our_options(options, folder),
            estimator="grpo",
            kl_in="loss",
            kl_estimator="k3",
            kl_coef=KL_COEF,
            loss_mean="sequence",
            samples_per_prompt=SAMPLES,
            share_prompts=share_prompts,
            batch_size=NUM_PROMPTS * SAMPLES,
            epochs=1,
            minibatches=1,
            steps=1,
            max_new_tokens=NEW_TOKENS,
        )
    )
    clock, computed = training.Clock(), []
    train = trainer.learner.train
    trainer.learner.train = lambda batch, **more: computed.append(batch.num_tokens) or train(batch, **more)
    if options.device != "cpu":  # once before, to load kernels
        trainer.step()
        trainer.log.timer.lap()
    with clock:
        metrics = trainer.step()
    phases = trainer.log.timer.lap()
    checked = {name.rpartition("/")[2]: metrics[name] for name in CHECKED}
    return {
        "seconds": clock.seconds,
        "tokens": int(metrics["num_tokens"]),
        "computed": computed[-1],
        **{name: phases[name] for name in PHASES},
        **checked,
    }


def trl(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    prompts = [row["prompt"] for row in task.read(folder / "prompts.jsonl")]
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=share_of_even,
        args=GRPOConfig(
            **training.trainer_options(options, folder),
            per_device_train_batch_size=NUM_PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
            beta=KL_COEF,
            loss_type="grpo",
            num_iterations=1,
            max_steps=1 if options.device == "cpu" else 2,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model", padding_side="left"),
    )
    return training.train_theirs(trainer)


def operations(config: Any, prompts: list[int]) -> float:
    """Floating-point operations of an iteration without padding, each response with its prompt."""
    lengths = [n + NEW_TOKENS for n in prompts for _ in range(SAMPLES)]
    forward = sides.forward_operations(config, lengths, len(lengths) * NEW_TOKENS)
    return 5 * forward  # generation, reference, and three times in the update


def main() -> None:
    from transformers import AutoTokenizer

    shared = {flag: sides.OPTIONS[flag] for flag in ("--shape", "--data", "--trl")}
    report = sides.begin("groups", shared | {"--repeats": sides.OPTIONS["--repeats"] | {"default": 2}})
    options = report.options
    options.pairs = NUM_PROMPTS
    pythons = sides.pythons(options.trl) | {APART: sys.executable}
    with sides.made(options, "model") as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        prompts = [len(tokenizer(row["prompt"]).input_ids) for row in task.read(folder / "prompts.jsonl")]
        runs = sides.alternate(pythons, options, folder)
        for name in (name.rpartition("/")[2] for name in CHECKED):
            once, apart = (runs[side][0][name] for side in ("fastrlhf", APART))
            limit = RTOL if options.device == "cpu" else sides.BF16_RTOL
            assert abs(once - apart) <= limit * abs(apart), f"{name}: {once}, prompts apart {apart}"
        figures = {
            phase: {n: statistics.median(run[phase] for run in rs) for n, rs in runs.items() if phase in rs[0]}
            for phase in PHASES
        }
        figures["tokens_computed"] = {
            n: of_side[0]["computed"] for n, of_side in runs.items() if "computed" in of_side[0]
        }
        count = operations(llama.config(task.SHAPES[options.shape]), prompts)
        case = f"{options.shape}, {NUM_PROMPTS} prompts x {SAMPLES}, {NEW_TOKENS} new tokens"
        sides.add(report, case, runs, count, **figures)
    report.finish()


if __name__ == "__main__":
    sides.run(main, {"fastrlhf": fastrlhf, "trl": trl, APART: partial(fastrlhf, share_prompts=False)})
