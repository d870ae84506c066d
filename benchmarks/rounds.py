"""Does `fastrlhf iterate` raise the gold reward round by round, and is that because its labels are fresh?

    python -m benchmarks.rounds toy                 # 5 seeds of a tiny random model; gold: overoptimization.py's
    python -m benchmarks.rounds demo --run FOLDER   # SmolLM2-135M after the SFT of `fastrlhf run --output FOLDER`

Three ways to the same number of PPO steps, in rounds that begin alike (a new value model, new moments) and draw alike:

fresh   `fastrlhf iterate`: every round labels pairs of its policy, and trains a reward model on all pairs so far
first   the reward model of round 1 in every round: no labels after the first round's
many    a reward model of as many pairs as `fresh` ends with, all of the first policy: as many labels, but none fresh

A row of the CSV file is a policy: the gold reward of its answers to held-out prompts, with its standard error over
prompts. Round 0 is the policy to begin with. What the file has is not run again (--anew does).
"""

import argparse
import csv
import json
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
from benchmarks.machine import machine
from fastrlhf import PPO
from fastrlhf.commands.feedback.iterate import Iterate
from fastrlhf.commands.run import Run
from fastrlhf.settings.feedback import IterateConfig
from fastrlhf.settings.run import RunConfig
from fastrlhf.stats.means import Mean

logging.disable_progress_bar()

RESULTS = Path(__file__).parent / "results" / "cpu" / "rounds"
SEEDS = {"toy": 5, "demo": 1}
WAYS = ("fresh", "first", "many")
COLUMNS = ("seed", "way", "round", "gold", "gold_error", "score", "kl", "comparisons", "accuracy")
FACTS = ("processor", "isa", "threads", "python", "torch", "fastrlhf", "commit")
Row = dict[str, Any]


def toy(folder: Path, seed: int, **changes: Any) -> IterateConfig:
    """Writes a tiny random model of 61 words, and prompts; returns the settings of its rounds."""
    torch.manual_seed(seed)
    vocab = llama.TINY[-1]
    llama.make(llama.TINY, "cpu").save_pretrained(folder / "model")
    task.words(vocab).save_pretrained(folder / "model")
    words = range(vocab - len(task.SPECIAL))
    task.write(folder / "prompts.jsonl", [{"prompt": f"{n} {m}"} for n in words for m in words])
    task.write(folder / "ppo.yaml", [{"value_learning_rate": 3e-3}])
    settings: Row = {
        "model": str(folder / "model"),
        "data": str(folder / "prompts.jsonl"),
        "gold": "benchmarks.overoptimization:few_good",
        "output": str(folder / "fresh"),
        "seed": seed,
        "rounds": 5,
        "num_pairs": 256,
        "num_heldout": 192,
        "reward_epochs": 10,  # so that a tiny model learns that more is better up to a point
        "reward_learning_rate": 3e-3,
        "steps": 5,
        "learning_rate": 1e-3,
        "max_prompt_tokens": 8,
        "max_new_tokens": 8,
        "ppo": str(folder / "ppo.yaml"),
        "device": "cpu",
    }
    return IterateConfig(**{**settings, **changes})


def demo(folder: Path, seed: int, run: Path, **changes: Any) -> IterateConfig:
    """The settings of rounds from the SFT model of a demo, which is made first unless it is there."""
    first = Run(RunConfig(output=str(run), resume=run.exists(), device="cpu"))
    for name, _ in first:
        if name == "sft":
            break
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(run / f"data/{split}.jsonl").read_bytes() for split in ("reward", "ppo", "heldout")]
    (folder / "prompts.jsonl").write_bytes(b"".join(rows))
    task.write(folder / "reward.yaml", [{"warmup_ratio": 0.1, "save_every": 0}])
    task.write(folder / "ppo.yaml", [{"value_learning_rate": first.config.value_learning_rate, "save_every": 0}])
    settings: Row = {
        "model": str(run / "sft/model"),
        "data": str(folder / "prompts.jsonl"),
        "gold": first.config.gold,
        "output": str(folder / "fresh"),
        "seed": seed,
        "rounds": 2,
        "num_pairs": 128,
        "num_heldout": 120,
        "reward_learning_rate": first.config.reward_learning_rate,
        "reward_batch_size": 10,
        "steps": 6,
        "batch_size": first.config.batch_size,
        "learning_rate": 3e-5,
        "kl_coef": first.config.kl_coef,
        "max_prompt_tokens": first.config.max_prompt_tokens,
        "max_new_tokens": first.config.max_new_tokens,
        "max_tokens": first.config.max_tokens,
        "reward": str(folder / "reward.yaml"),
        "ppo": str(folder / "ppo.yaml"),
        "device": "cpu",
    }
    return IterateConfig(**{**settings, **changes})


def walk(config: IterateConfig, way: str) -> Iterator[Row]:
    """The policies of a way, round by round. What is in its folder is taken up."""
    folder = Path(config.output).with_name(way)
    changes: Row = {"output": str(folder), "resume": folder.exists()}
    if way != "fresh":
        changes["rounds"] = 1
    if way == "many":
        changes["num_pairs"] = config.rounds * config.num_pairs
    job = Iterate(replace(config, **changes))
    for stage, line in job:
        print(f"{way}: {stage}: {line}", flush=True)
    rows = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["rounds"]
    yield {"round": 0, "gold": rows[0]["gold_before"], "gold_error": rows[0]["gold_before_error"]}
    for row in rows:
        found = {name: row[f"heldout_{name}"] for name in ("gold", "gold_error", "score", "accuracy")}
        yield {**found, **{name: row[name] for name in ("round", "kl", "comparisons")}}
    for number in range(len(rows) + 1, config.rounds + 1):  # on with the first reward model
        reward = str(job.round_folder(1) / "reward/model")
        last = list(PPO(replace(job.ppo_config(number), reward=reward)))[-1]
        found = {name: last[f"eval/{name}"] for name in ("score", "score_error", "trained_score")}
        print(f"{way}: round {number}: gold {found['score']:.3f}", flush=True)
        yield {
            "round": number,
            "gold": found["score"],
            "gold_error": found["score_error"],
            "score": found["trained_score"],
            "kl": last["objective/kl"],
            "comparisons": rows[0]["comparisons"],
        }


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, none if there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    return [{**row, "seed": int(row["seed"]), "round": int(row["round"])} for row in rows]


def write(path: Path, rows: list[Row]) -> None:
    """Writes the rows in order of seed, way and round."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=lambda row: (row["seed"], WAYS.index(row["way"]), row["round"])):
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def means(rows: list[Row]) -> dict[tuple[str, int], Mean]:
    """The gold reward by way and round: the mean of the seeds, its standard error over them, or over the prompts of a
    single one."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["way"], row["round"]), []).append(row)
    result = {}
    for key, group in found.items():
        mean = Mean.of(torch.tensor([float(row["gold"]) for row in group]))
        result[key] = mean if mean.num > 1 else replace(mean, error=float(group[0]["gold_error"] or "nan"))
    return result


def table(rows: list[Row]) -> str:
    """The gold reward of the ways, a line a round, and what labels that are fresh gained by the last."""
    by_place = means(rows)
    ways = [way for way in WAYS if (way, 0) in by_place]
    last = max(number for _, number in by_place)
    lines = ["| round | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for number in range(last + 1):
        lines.append(f"| {number} | " + " | ".join(str(by_place.get((way, number), "")) for way in ways) + " |")
    gold = {(row["way"], row["seed"]): float(row["gold"]) for row in rows if row["round"] == last}
    for way in ways[1:]:
        seeds = [seed for other, seed in gold if other == way and ("fresh", seed) in gold]
        if len(seeds) > 1:
            gain = Mean.of(torch.tensor([gold["fresh", seed] - gold[way, seed] for seed in seeds]))
            lines.append(f"fresh - {way} after round {last}: {gain}, of {gain.num} seeds")
    return "\n".join(lines)


def plot(path: Path, rows: list[Row]) -> None:
    """The gold reward over the rounds, a line a way, with standard errors."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "fastrlhf", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axis = figure.subplots()
        for way in WAYS:
            found = sorted((number, mean) for (other, number), mean in means(rows).items() if other == way)
            values, errors = ([getattr(mean, name) for _, mean in found] for name in ("mean", "error"))
            axis.errorbar([number for number, _ in found], values, errors, marker=".", capsize=3, label=way)
        axis.set_title("gold reward of held-out answers", loc="left", fontsize=10)
        axis.set_xlabel("round")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(SEEDS))
    parser.add_argument("--seeds", type=int, help="how many; default: 5 of the toy, 1 of the demo")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="default: all; fresh and first of the demo")
    parser.add_argument("--run", type=Path, default=Path("demo"), help="folder of the demo; its rounds are kept there")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder for TASK.csv, TASK.json and TASK.svg")
    parser.add_argument("--anew", action="store_true", help="run again what is there")
    options = parser.parse_args(arguments)
    path = options.into / f"{options.task}.csv"
    options.into.mkdir(parents=True, exist_ok=True)
    rows = [] if options.anew else read(path)
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(options.seeds or SEEDS[options.task]):
            for way in options.ways or (WAYS if options.task == "toy" else WAYS[:2]):
                if any((row["seed"], row["way"]) == (seed, way) for row in rows):
                    continue
                if options.task == "toy":
                    config = toy(Path(temporary) / str(seed), seed)
                else:
                    config = demo(options.run / "rounds" / str(seed), seed, options.run)
                rows += [{"seed": seed, "way": way, **row} for row in walk(config, way)]
                write(path, rows)
                facts = {name: fact for name, fact in machine("cpu", tiny=True).items() if name in FACTS}
                path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    plot(path.with_suffix(".svg"), rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
