"""Reward models, files and settings of the tests of `fastrlhf evaluate reward`."""

import json
import random
from pathlib import Path

import torch
from loops import model_folder, pairs, write_rows
from tiny import tiny_tokenizer

from fastrlhf.commands.reward_report.command import EvaluateReward
from fastrlhf.models.policy import RewardModel
from fastrlhf.settings.trust import EvaluateRewardConfig


def reward_folder(path, seed):
    """A random reward model in a folder; returns it as text."""
    torch.manual_seed(seed)
    model = RewardModel.from_pretrained(model_folder(path / "body"), new_head=True)
    model.bias = 0.25
    model.save_pretrained(path / "reward")
    tiny_tokenizer().save_pretrained(path / "reward")
    return str(path / "reward")


def make_files(folder):
    """Two reward models, and a file for each kind of data."""
    rng = random.Random(0)
    pairs(folder / "plain.jsonl", num=40)
    rows = [json.loads(line) for line in (folder / "plain.jsonl").read_text().splitlines()]
    told = [{**row, "rater": rng.choice(["ann", "bob"]), "split": n % 2, "id": n} for n, row in enumerate(rows)]
    told += [{**row, "rater": "cy"} for row in told[:10]]
    subsets = [{**row, "subset": f"s{n % 3}", "section": "ab"[n % 3 > 0]} for n, row in enumerate(rows)]
    return {
        "a": reward_folder(folder / "a", 1),
        "b": reward_folder(folder / "b", 2),
        "data": write_rows(folder / "data.jsonl", told),
        "benchmark": write_rows(folder / "benchmark.jsonl", subsets),
        "reference": write_rows(folder / "reference.jsonl", [{"prompt": f"zzz {n}"} for n in range(30)]),
        "folder": folder,
    }


def settings(files, output, **changes):
    return EvaluateRewardConfig(
        **{"model": files["a"], "data": files["data"], "output": str(output), "max_length": 256, **changes}
    )


def report(config):
    """Runs the command; returns its summary, its rows of scores, its page and what it said."""
    said = list(EvaluateReward(config))
    output = Path(config.output)
    rows = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    return json.loads((output / "summary.json").read_text()), rows, (output / "report.html").read_text(), said
