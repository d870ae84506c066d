"""One iteration of PPO: our loop, and that of TRL 1.12, the last with a PPOTrainer.

16 prompts of HH-RLHF lengths (task.py), 64 new tokens each, 4 epochs of 4 minibatches with an optimizer step each;
policy, reference, reward and value model have one shape, and the value model starts as a copy of the reward model.

The sides draw other responses, so a run of ours is given those that TRL drew: scores and entropy must then be TRL's,
and the mean value loss of the update too, up to VALUE_RTOL: the minibatches of the two are not the same, and the
learning rate is too small for that to matter.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import llama
from benchmarks.loops import sides, task, training

NUM_PROMPTS, NEW_TOKENS, EPOCHS, MINIBATCHES, LEARNING_RATE = 16, 64, 4, 4, 1e-8
SETTINGS = {"kl_coef": 0.05, "gamma": 1.0, "lam": 0.95}
RTOL, VALUE_RTOL = 1e-5, 1e-3
PHASES = ("generate_seconds", "score_seconds", "update_seconds")
TRL_PPO = {
    "default": os.environ.get("TRL_PPO_PYTHON", sys.executable),
    "help": "Python with TRL 1.12; default: TRL_PPO_PYTHON in the environment, or this one",
    "metavar": "PYTHON",
}


def fastrlhf(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    trainer = our_trainer(options, folder)
    clock = training.Clock()
    if options.device != "cpu":  # once before, to load kernels
        trainer.step()
        trainer.log.timer.lap()
    with clock:
        metrics = trainer.step()
    phases = trainer.log.timer.lap()
    return {"seconds": clock.seconds, "tokens": int(metrics["num_tokens"]), **{name: phases[name] for name in PHASES}}


def check(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Our step on the responses that TRL drew."""
    from fastrlhf.generation.engine import Sample
    from fastrlhf.packing import pack

    trainer = our_trainer(options, folder)

    def given(prompts: list[Any]) -> list[Sample]:
        rows = [(prompt.tokens, options.responses[str(prompt.tokens)]) for prompt in prompts]
        batch = pack([p + r for p, r in rows], prompt_lengths=[len(p) for p, _ in rows], device=trainer.device)
        logprobs = trainer.logprobs(trainer.policy, batch).split(batch.response_lengths)
        end = trainer.tokenizer.eos_token_id
        return [
            Sample(p, r, of_row.tolist(), of_row.tolist(), r[-1] == end)
            for (p, r), of_row in zip(rows, logprobs, strict=True)
        ]

    trainer.generate = given
    metrics = trainer.step()
    names = {"scores": "objective/scores", "entropy": "objective/entropy", "value_loss": "ppo/value/loss"}
    return {what: metrics[name] for what, name in names.items()}


def our_trainer(options: argparse.Namespace, folder: Path) -> Any:
    from fastrlhf.settings.ppo import PPOConfig
    from fastrlhf.trainers.ppo.trainer import PPO

    return PPO(
        PPOConfig(
            model=str(folder / "model"),
            reward=str(folder / "reward"),
            data=str(folder / "prompts.jsonl"),
            **training.our_options(options, folder)
            | {"learning_rate": LEARNING_RATE, "max_grad_norm": 1e9},  # TRL's does not clip
            **SETTINGS,
            value_learning_rate=LEARNING_RATE,
            batch_size=NUM_PROMPTS,
            epochs=EPOCHS,
            minibatches=MINIBATCHES,
            steps=1,
            max_new_tokens=NEW_TOKENS,
        )
    )


def trl(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch
    import trl.experimental.ppo.ppo_trainer as module
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    prompts = [tokenizer(row["prompt"]).input_ids for row in task.read(folder / "prompts.jsonl")]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32) for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32) for _ in range(2)
    )
    config = PPOConfig(
        **training.trainer_options(options, folder, learning_rate=LEARNING_RATE),
        **SETTINGS,
        per_device_train_batch_size=NUM_PROMPTS,  # a micro-batch is then a minibatch, and each has an optimizer step
        num_mini_batches=MINIBATCHES,
        num_ppo_epochs=EPOCHS,
        total_episodes=NUM_PROMPTS,
        response_length=NEW_TOKENS,
        local_rollout_forward_batch_size=NUM_PROMPTS,
        stop_token="eos",
        temperature=1.0,
        num_sample_generations=0,
    )
    generate, drawn = module.batch_generation, []

    def watched(*args: Any) -> Any:
        with training.Clock() as clock:
            result = generate(*args)
        drawn.append((args[1], result[0], clock.seconds))
        return result

    module.batch_generation = watched
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": prompt} for prompt in prompts]),
    )
    lines: list[dict[str, float]] = []
    log = trainer.log
    trainer.log = lambda metrics, *args, **kwargs: (lines.append(metrics), log(metrics, *args, **kwargs))
    result = training.train_theirs(trainer)
    ((queries, sequences, seconds),) = drawn
    responses = responses_of(queries, sequences, tokenizer)
    tokens = sum(map(len, prompts)) + sum(map(len, responses.values()))
    num_responses = sum(map(len, responses.values()))
    return {
        "seconds": result["seconds"],
        "tokens": tokens,
        "generate_seconds": seconds,
        "responses": responses,
        "scores": lines[-1]["objective/scores"],
        "entropy": lines[-1]["objective/entropy"] * NUM_PROMPTS / num_responses,
        "value_loss": lines[-1]["loss/value_avg"],
    }


def responses_of(queries: Any, sequences: Any, tokenizer: Any) -> dict[str, list[int]]:
    """The response to each prompt up to its end (or a pad token, which TRL takes for one), by the prompt's tokens."""
    found = {}
    for query, row in zip(queries.tolist(), sequences[:, queries.shape[1] :].tolist(), strict=True):
        prompt = [token for token in query if token != tokenizer.pad_token_id]
        ends = [place + 1 for place, token in enumerate(row) if token == tokenizer.eos_token_id]
        response = row[: ends[0]] if ends else row
        if tokenizer.pad_token_id in response:
            response = response[: response.index(tokenizer.pad_token_id)]
        found[str(prompt)] = response
    return found


def expect_equal(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """Returns the relative errors of what both made of TRL's responses. Raises AssertionError above the limits."""
    limits = {"scores": RTOL, "entropy": RTOL, "value_loss": VALUE_RTOL}
    errors = {name: abs(ours[name] - theirs[name]) / abs(theirs[name]) for name in limits}
    for name, limit in limits.items():
        assert errors[name] <= limit, f"{name} of TRL's responses: ours {ours[name]}, TRL's {theirs[name]}"
    return errors


def operations(config: Any, prompts: list[int]) -> float:
    """Floating-point operations of an iteration without padding, with logits for response tokens alone."""
    lengths, responses = [n + NEW_TOKENS for n in prompts], len(prompts) * NEW_TOKENS
    policy, scalar = (sides.forward_operations(config, lengths, num) for num in (responses, 0))
    generation, scoring = policy, policy + 2 * scalar
    return generation + scoring + EPOCHS * 3 * (policy + scalar)


def main() -> None:
    from transformers import AutoTokenizer

    shared = {flag: sides.OPTIONS[flag] for flag in ("--shape", "--data", "--repeats")}
    report = sides.begin("ppo", shared | {"--trl-ppo": TRL_PPO})
    options = report.options
    options.pairs = NUM_PROMPTS
    pythons = sides.pythons(options.trl_ppo, "trl.experimental.ppo")
    with sides.made(options, "model", "reward") as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        prompts = [len(tokenizer(row["prompt"]).input_ids) for row in task.read(folder / "prompts.jsonl")]
        runs = sides.alternate(pythons, options, folder)
        if "trl" in runs:
            theirs = runs["trl"][0]
            ours = sides.once("check", pythons["fastrlhf"], options, folder, responses=theirs["responses"])
            print("  errors: " + ", ".join(f"{k} {v:.1e}" for k, v in expect_equal(theirs, ours).items()))
        phases = {
            phase: {n: statistics.median(run[phase] for run in rs) for n, rs in runs.items() if phase in rs[0]}
            for phase in PHASES
        }
        count = operations(llama.config(task.SHAPES[options.shape]), prompts)
        sides.add(report, f"{options.shape}, {NUM_PROMPTS} prompts, {NEW_TOKENS} new tokens", runs, count, **phases)
    report.finish()


if __name__ == "__main__":
    sides.run(main, {"fastrlhf": fastrlhf, "trl": trl, "check": check})
