"""Does PPO collapse? Runs with several seeds, judged by one rule and shown as curves.

    python -m benchmarks.collapse toy                 # 5 seeds of a tiny random model and a rule
    python -m benchmarks.collapse demo --run FOLDER   # 3 seeds of the demo's PPO (`fastrlhf run --output FOLDER`)

A run collapsed if at its end the gold score of held-out answers is below that before the first step, if the entropy is
below a tenth of the first step's, or if the KL to the reference is above three times its target. Every setting is the
default, but for sizes, seeds, and the learning rates of the toy, whose random model learns nothing at those of language
models. A seed whose curve is in the CSV file is not run again (--anew does), so that a run of hours can be taken up;
the demo's models are trained first where FOLDER lacks them.
"""

import argparse
import csv
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks import llama
from benchmarks.loops import task
from fastrlhf import PPO, PPOConfig
from fastrlhf.commands.run import Run
from fastrlhf.settings.run import RunConfig
from fastrlhf.stats.means import Mean

logging.disable_progress_bar()  # transformers' bar of written weights, for every best model

RESULTS = Path(__file__).parent / "results" / "cpu" / "collapse"
SEEDS = {"toy": 5, "demo": 3}
GOOD, VOCAB, LENGTH = 24, llama.TINY[-1], 8  # the toy: its first tokens after the special ones are worth 1 / LENGTH
DEMO_TARGET = 6.0  # nats a response, that of Ziegler et al., arXiv 1909.08593; the demo's coefficient is fixed
COLUMNS = {
    "score": "objective/scores",
    "kl": "objective/kl",
    "entropy": "objective/entropy",
    "length": "response/length",
    "eos_rate": "response/eos_rate",
    "gold": "eval/score",
    "gold_error": "eval/score_error",
}
Row = dict[str, float | str]


def good_tokens(prompts: list[str], responses: list[str], *, response_ids: list[list[int]], **_: Any) -> list[float]:
    """The toy's reward: good tokens over the longest length, so that a short response is worth less."""
    first = len(task.SPECIAL)
    return [sum(first <= token < first + GOOD for token in ids) / LENGTH for ids in response_ids]


def toy_configs(seeds: int, folder: Path) -> Iterator[PPOConfig]:
    """A run for each seed: of a model of its own, on words."""
    for seed in range(seeds):
        here = folder / str(seed)
        torch.manual_seed(seed)
        tokenizer = task.words(VOCAB)
        llama.make(llama.TINY, "cpu").save_pretrained(here / "model")
        tokenizer.save_pretrained(here / "model")
        words = range(VOCAB - len(task.SPECIAL))
        task.write(here / "prompts.jsonl", [{"prompt": f"{n} {m}"} for n in words for m in words if (n + m) % 8])
        task.write(here / "heldout.jsonl", [{"prompt": f"{n} {m}"} for n in words for m in words if not (n + m) % 8])
        yield PPOConfig(
            model=str(here / "model"),
            data=str(here / "prompts.jsonl"),
            output=str(here / "run"),
            reward=good_tokens,
            eval_data=str(here / "heldout.jsonl"),
            eval_every=2,
            eval_limit=128,
            steps=40,
            max_new_tokens=LENGTH,
            learning_rate=3e-3,
            value_learning_rate=3e-3,
            seed=seed,
            save_every=0,
            device="cpu",
        )


def toy_target(kl_coef: float) -> float:
    """The KL of the policy that PPO's objective is best for, in nats: by backward induction over the tokens, from a
    uniform policy, which a random model nearly is."""
    value, kl = 0.0, 0.0  # of the tokens that are still to come
    for _ in range(LENGTH):
        gains = [value + 1 / LENGTH] * GOOD + [0.0] + [value] * (VOCAB - GOOD - 1)  # good tokens, the end, the others
        total = sum(math.exp(gain / kl_coef) for gain in gains)
        chances = [math.exp(gain / kl_coef) / total for gain in gains]
        kl = sum(p * math.log(p * VOCAB) for p in chances) + (1 - chances[GOOD]) * kl
        value = kl_coef * math.log(total / VOCAB)
    return kl


def demo_configs(seeds: int, folder: Path, run: Path) -> Iterator[PPOConfig]:
    """A run for each seed, of the SFT policy and the reward model of one demo, judged by its gold reward."""
    demo = Run(RunConfig(output=str(run), resume=run.exists(), device="cpu"))
    for name, _ in demo:
        if name == "reward":
            break
    for seed in range(seeds):
        yield replace(
            demo.ppo_config(),
            output=str(folder / str(seed)),
            seed=seed,
            resume=False,
            eval_data=str(run / "data/heldout.jsonl"),
            eval_reward=demo.config.gold,
            eval_every=2,
            eval_limit=64,
            save_every=0,
        )


def curve(config: PPOConfig) -> Iterator[Row]:
    """The steps of a run, after the held-out answers before the first one."""
    trainer = PPO(config)
    held_out = trainer.held_out
    samples = trainer.generate(held_out.prompts, held_out=True)
    gold = Mean.of(held_out.scorer(held_out.prompts, samples, trainer.pack(samples)))
    yield {"seed": config.seed, "step": 0, "gold": gold.mean, "gold_error": gold.error}
    for step, metrics in enumerate(trainer, 1):
        found = {column: metrics[name] for column, name in COLUMNS.items() if name in metrics}
        yield {"seed": config.seed, "step": step, **found}


def collapse(rows: list[Row], target: float) -> str | None:
    """In which way a run collapsed; None if it did not."""
    gold = [float(row["gold"]) for row in rows if row.get("gold", "") != ""]
    steps = [{name: float(row[name]) for name in ("entropy", "kl")} for row in rows[1:]]
    if gold[-1] < gold[0]:
        return f"the gold score fell from {gold[0]:.3f} to {gold[-1]:.3f}"
    if steps[-1]["entropy"] < 0.1 * steps[0]["entropy"]:
        return f"the entropy fell from {steps[0]['entropy']:.3f} to {steps[-1]['entropy']:.3f}"
    if steps[-1]["kl"] > 3 * target:
        return f"the KL is {steps[-1]['kl']:.2f}, its target {target:.2f}"
    return None


def read(path: Path) -> dict[int, list[Row]]:
    """The curves of a CSV file by seed."""
    curves: dict[int, list[Row]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                curves.setdefault(int(row["seed"]), []).append(row)
    return curves


def write(path: Path, curves: dict[int, list[Row]]) -> None:
    """Writes the curves in the order of the seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["seed", "step", *COLUMNS], lineterminator="\n")
        writer.writeheader()
        for seed in sorted(curves):
            for row in curves[seed]:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def plot(path: Path, curves: dict[int, list[Row]], target: float) -> None:
    """Gold score, KL and entropy over the steps, a line a seed; dashed where a run would have collapsed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    titles = {"gold": "gold score of held-out answers", "kl": "KL, nats a response", "entropy": "entropy, nats a token"}
    with rc_context({"svg.hashsalt": "fastrlhf", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 3), layout="constrained")
        for axis, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
            limits = [3 * target] if name == "kl" else []
            for seed, rows in sorted(curves.items()):
                points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name, "") != ""]
                (line,) = axis.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=f"seed {seed}")
                if name != "kl":
                    limit = points[0][1] * (0.1 if name == "entropy" else 1)
                    axis.axhline(limit, color=line.get_color(), linestyle="--", linewidth=0.6)
            for limit in limits:
                axis.axhline(limit, color="#8a8f98", linestyle="--", linewidth=1)
            axis.set_title(title, loc="left", fontsize=10)
            axis.set_xlabel("step")
            axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7)
        figure.savefig(path, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(SEEDS))
    parser.add_argument("--seeds", type=int, help="how many; default: 5 of the toy, 3 of the demo")
    parser.add_argument("--run", type=Path, default=Path("demo"), help="folder of the demo whose models are taken")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder for TASK.csv and TASK.svg")
    parser.add_argument("--anew", action="store_true", help="run seeds again that are there")
    options = parser.parse_args(arguments)
    path = options.into / f"{options.task}.csv"
    curves = {} if options.anew else read(path)
    target, failed = DEMO_TARGET, 0
    with tempfile.TemporaryDirectory() as folder:
        seeds = options.seeds or SEEDS[options.task]
        if options.task == "toy":
            configs = toy_configs(seeds, Path(folder))
            target = toy_target(0.05)
        else:
            configs = demo_configs(seeds, Path(folder), options.run)
        for config in configs:
            if config.seed not in curves:
                curves[config.seed] = list(curve(config))
                write(path, curves)
                plot(path.with_suffix(".svg"), curves, target)
    for seed, rows in sorted(curves.items()):
        text, gold = collapse(rows, target), [row["gold"] for row in rows if row.get("gold", "") != ""]
        last = {name: float(rows[-1][name]) for name in ("kl", "entropy")}
        ends = f"gold {float(gold[0]):.3f} to {float(gold[-1]):.3f}, KL {last['kl']:.2f} (target {target:.2f})"
        print(f"seed {seed}: {ends}, entropy {float(rows[1]['entropy']):.2f} to {last['entropy']:.2f}", end="")
        print(f": COLLAPSED, {text}" if text else ": no collapse", flush=True)
        failed += text is not None
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
