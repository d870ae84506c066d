"""The tables of docs/metrics.md beside what tiny runs of every trainer write: none is missing, none is made up."""

import re
from collections import defaultdict
from pathlib import Path

import pytest
from compare import filled
from loops import demonstrations, model_folder, pairs, write_rows
from ppo_runs import share_of_low_tokens
from tiny import tiny_tokenizer

from fastrlhf import DPO, KTO, PPO, SFT, DPOConfig, PPOConfig, RewardConfig, RewardTrainer, SFTConfig
from fastrlhf.models.policy import RewardModel
from fastrlhf.runtime.jsonl import read_jsonl
from fastrlhf.settings.ppo import ESTIMATORS

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()

FILES = ("metrics.jsonl", "timing.jsonl", "samples.jsonl")
HEADINGS = {SFT: "SFT", RewardTrainer: "Reward models", DPO: "DPO", KTO: "KTO", PPO: "PPO and its relatives"}


def judged(path):
    """By layout of the file: rows that reward models, DPO and KTO learn from, one prompt each."""
    prompts = [f"Say {n}" for n in range(8)]
    texts = [{"prompt": p, "chosen": "xx", "rejected": f"y{n}"} for n, p in enumerate(prompts)]
    of_heads = [{**row, "head": ("kind", "brief")[n % 2]} for n, row in enumerate(texts)]
    ranked = [{"prompt": p, "responses": ["x", "y", "z"], "ranks": [0, 1, 1 + n % 2]} for n, p in enumerate(prompts)]
    answers = [{"prompt": p, "completion": "xy"[n % 2]} for n, p in enumerate(prompts)]
    layouts = {
        "heads": of_heads,
        "ranked": ranked,
        "labelled": [{**row, "label": n % 2 == 0} for n, row in enumerate(answers)],
        "rated": [{**row, "rating": n} for n, row in enumerate(answers)],
        "attributes": [{**row, "ratings": {"kind": n, "brief": n % 3}} for n, row in enumerate(answers)],
    }
    return {name: write_rows(path / f"{name}.jsonl", rows) for name, rows in layouts.items()}


def runs(path):
    """The trainers, each with settings that make it write all that it can."""
    model, rows = model_folder(path / "model"), judged(path)
    rows |= {"pairs": pairs(path / "pairs.jsonl", 8), "demonstrations": demonstrations(path / "texts.jsonl", 8)}
    RewardModel.from_pretrained(model, new_head=True).save_pretrained(path / "reward")
    tiny_tokenizer().save_pretrained(path / "reward")
    of_rows = {"model": model, "template": "none", "batch_size": 4, "eval_fraction": 0.5, "device": "cpu"}
    yield SFT, SFTConfig, {**of_rows, "data": rows["demonstrations"]}
    for name, objective in (
        ("pairs", "auto"),
        ("heads", "auto"),
        ("ranked", "plackett_luce"),
        ("ranked", "all_pairs"),
        ("labelled", "auto"),
        ("rated", "auto"),
        ("attributes", "auto"),
    ):
        yield RewardTrainer, RewardConfig, {**of_rows, "data": rows[name], "objective": objective}
    for loss in ("sigmoid", "ipo", "hinge", "simpo", "orpo"):
        yield DPO, DPOConfig, {**of_rows, "data": rows["pairs"], "loss": loss}
    yield KTO, DPOConfig, {**of_rows, "data": rows["labelled"], "loss": "kto"}
    prompts = write_rows(path / "prompts.jsonl", [{"prompt": f"Say {n}"} for n in range(8)])
    short = {
        "model": model,
        "data": prompts,
        "reward": share_of_low_tokens,
        "steps": 1,
        "batch_size": 4,
        "max_new_tokens": 4,
    }
    short |= {"minibatches": 1, "epochs": 1, "device": "cpu"}
    for estimator in ESTIMATORS[1:]:
        yield PPO, PPOConfig, {**short, "samples_per_prompt": 2, "estimator": estimator}
    options = {
        "eval_data": prompts,
        "eval_reward": share_of_low_tokens,
        "eval_every": 1,
        "ptx_data": rows["demonstrations"],
    }
    options |= {
        "reward": f"{path / 'reward'}=1,ppo_runs:share_of_low_tokens=0.5",
        "kl_in": "loss",
        "kl_estimator": "k3",
    }
    assert ESTIMATORS[0] == "gae"
    yield PPO, PPOConfig, {**short, **options, "value_warmup_steps": 0, "samples_every": 1}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """By trainer and file: the names in the lines of its runs; by trainer and "": the files that the runs leave."""
    path, found = tmp_path_factory.mktemp("runs"), defaultdict(set)
    for n, (trainer, config, settings) in enumerate(runs(path)):
        output = path / str(n)
        assert list(trainer(config(**settings, output=str(output))))
        for file in FILES:
            if (output / file).exists():
                found[trainer, file].update(*read_jsonl(output / file))
        found[trainer, ""] |= {each.name for each in output.iterdir() if not each.name.startswith(".")}
    return found


def rows(heading):
    """The rows of the table below a heading: the cells of each."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")
    ]
    assert found, f"no table below {heading}"
    return found


def differences(names, table):
    """The names that no row has, and the rows that have none of them. NAME, METRIC and PHASE stand for any name."""
    patterns = {row: re.compile(re.sub("NAME|METRIC|PHASE", "[^/]+", re.escape(row))) for row in table}
    missing = {name for name in names if not any(pattern.fullmatch(name) for pattern in patterns.values())}
    return missing, {row for row, pattern in patterns.items() if not any(map(pattern.fullmatch, names))}


def table_names(*headings):
    return [row[0].strip("`") for heading in headings for row in rows(heading)]


@pytest.mark.parametrize(("trainer", "heading"), [(trainer, HEADINGS[trainer]) for trainer in HEADINGS])
def test_the_metrics_that_a_trainer_writes_are_those_of_its_table(written, trainer, heading):
    shared = () if trainer is PPO else ("SFT, reward models, DPO and KTO",)
    assert differences(written[trainer, "metrics.jsonl"], table_names(heading, *shared)) == (set(), set())


@pytest.mark.parametrize("file", ["timing.jsonl", "samples.jsonl"])
def test_the_columns_of_the_other_files_are_those_of_their_tables(written, file):
    names = set().union(*(written[trainer, file] for trainer in HEADINGS))
    assert differences(names, table_names(f"`{file}`")) == (set(), set())


def test_every_file_of_a_run_is_in_the_table(written):
    names = set().union(*(written[trainer, ""] for trainer in HEADINGS))
    table = PAGE.partition("| file or folder of a run |")[2].partition("\n\n")[0]
    assert {row.split("`")[1] for row in table.splitlines() if row.startswith("| `")} == names


@pytest.mark.parametrize(
    "heading", [*HEADINGS.values(), "SFT, reward models, DPO and KTO", *map("`{}`".format, FILES[1:])]
)
def test_every_row_has_a_meaning_a_unit_and_the_names_of_the_peers(heading):
    for cells in filled(rows(heading)):
        name, meaning, unit, *peers, _ = cells
        assert len(peers) == 2 and meaning and re.search("[a-z]", unit), name
        assert all(peer == "-" or "`" in peer or peer.startswith("a column") for peer in peers), name
