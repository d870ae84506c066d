"""Over-optimisation on a toy: a policy is pushed by a proxy until the gold reward, which the proxy learned from, falls.

    python -m benchmarks.overoptimization     # minutes on two cores; into benchmarks/results/cpu/overoptimization

The policy is a tiny random model, nearly uniform over 61 words and the end; a response has up to 8 tokens. The gold
reward counts good words, but more than FEW of them are worth less than none. Few of the policy's responses have so
many, so the pairs that the proxy learns from say little but "the more the better", and that is what it is pushed to.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks import llama
from benchmarks.loops import task
from fastrlhf.commands.overoptimize import Overoptimize
from fastrlhf.settings.best_of_n import OveroptimizeConfig

logging.disable_progress_bar()

RESULTS = Path(__file__).parent / "results" / "cpu" / "overoptimization"
GOOD, FEW, LENGTH = 12, 4, 8


def few_good(prompts: list[str], responses: list[str], *, response_ids: list[list[int]], **_: Any) -> list[float]:
    """The gold reward: good words, those beyond FEW counting -2."""
    first = len(task.SPECIAL)
    counts = [sum(first <= token < first + GOOD for token in ids) for ids in response_ids]
    return [float(min(num, FEW) - 2 * max(num - FEW, 0)) for num in counts]


def config(folder: Path, seed: int = 0, **changes: Any) -> OveroptimizeConfig:
    """Writes the toy's model and prompts into a folder; returns the settings of the study."""
    torch.manual_seed(seed)
    vocab = llama.TINY[-1]
    llama.make(llama.TINY, "cpu").save_pretrained(folder / "model")
    task.words(vocab).save_pretrained(folder / "model")
    words = range(vocab - len(task.SPECIAL))
    splits: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    for n in words:
        for m in words:
            splits[(n + m) % 8 == 0].append({"prompt": f"{n} {m}"})
    task.write(folder / "prompts.jsonl", splits[False])
    task.write(folder / "heldout.jsonl", splits[True])
    settings: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": str(folder / "prompts.jsonl"),
        "eval_data": str(folder / "heldout.jsonl"),
        "output": str(folder / "run"),
        "gold": "benchmarks.overoptimization:few_good",
        "n": 256,
        "limit": 1024,
        "eval_limit": 192,
        "num_pairs": 768,
        "reward_epochs": 2,
        "reward_learning_rate": 3e-3,
        "steps": 24,
        "eval_every": 1,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "value_learning_rate": 3e-3,
        "max_prompt_tokens": 8,
        "max_new_tokens": LENGTH,
        "max_slots": 512,
        "device": "cpu",
        "seed": seed,
    }
    return OveroptimizeConfig(**{**settings, **changes})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder for points.csv, curves.svg, summary.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        study = Overoptimize(config(Path(folder), options.seed))
        for stage, line in study:
            print(f"{stage}: {line}", flush=True)
        options.into.mkdir(parents=True, exist_ok=True)
        for name in ("points.csv", "summary.json", "curves.svg"):
            shutil.copy(study.output / name, options.into / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
