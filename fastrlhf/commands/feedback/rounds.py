"""What came out of a round of `fastrlhf iterate`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastrlhf.commands.feedback.rows import Row
from fastrlhf.data import load_pairs
from fastrlhf.data.template import load_tokenizer
from fastrlhf.models.policy import RewardModel
from fastrlhf.packing import pack
from fastrlhf.runtime.jsonl import read_jsonl
from fastrlhf.settings.feedback import IterateConfig
from fastrlhf.stats import accuracy as trust
from fastrlhf.stats.means import with_error

GOLD = {"heldout_gold": "eval/score", "heldout_gold_error": "eval/score_error"}  # of metrics, where gold judges


@torch.no_grad()
def accuracy(config: IterateConfig, model: Path, pairs: Path, *, max_length: int) -> Row:
    """Returns the accuracy of a reward model on a file's pairs, as training reports it."""
    options = config.model_options()
    reward_model = RewardModel.from_pretrained(model, freeze=True, **options)
    loaded = load_pairs(
        pairs,
        load_tokenizer(model),
        max_tokens=max_length,
        template=config.template,
        template_kwargs=config.template_kwargs,
        max_rejected=config.max_rejected,
    )
    rows = loaded.rows
    sides = [pair.prompt + side for pair in rows for side in (pair.chosen, pair.rejected)]
    parts = pack(sides, device=options["device"]).microbatches(config.max_tokens)
    scores = torch.cat([reward_model(part) for part in parts])
    labels, prompts = torch.tensor([pair.preference for pair in rows]), [tuple(pair.prompt) for pair in rows]
    found = trust.accuracy((scores[0::2] - scores[1::2]).cpu(), labels, clusters=prompts)
    return {"accuracy": found.accuracy, "low": found.low, "high": found.high, "num": found.num}


def last_evaluated(folder: Path) -> Row:
    """The last metrics of a round's reward model that have its accuracy on held-out pairs."""
    return [row for row in read_jsonl(folder / "reward/metrics.jsonl") if "eval/accuracy" in row][-1]


def round_row(folder: Path) -> Row:
    """The figures of a round.

    accuracy_before: of the last round's reward model on this round's pairs; None in the first
    gold_before, heldout_gold: the gold reward of answers to held-out prompts before PPO (two a prompt) and after it
        (one), with standard errors over prompts; None with a judge"""
    counts = json.loads((folder / "pairs/counts.json").read_text(encoding="utf-8"))
    before = counts.get("accuracy_before", {})
    reward, ppo = last_evaluated(folder), read_jsonl(folder / "ppo/metrics.jsonl")[-1]
    return {
        "pairs": len(read_jsonl(folder / "pairs/train.jsonl")),
        "comparisons": len(read_jsonl(folder / "comparisons.jsonl")),
        "accuracy_before": before.get("train", {}).get("accuracy"),
        "heldout_accuracy_before": before.get("heldout", {}).get("accuracy"),
        "heldout_accuracy": reward["eval/accuracy"],
        "heldout_pairs": reward["eval/num_pairs"],
        "score": ppo["objective/scores"],
        "kl": ppo["objective/kl"],
        # with a gold function that is what held-out answers are scored by, besides what is trained on
        "heldout_score": ppo.get("eval/trained_score", ppo["eval/score"]),
        "gold_before": counts["heldout"].get("mean_gold"),
        "gold_before_error": counts["heldout"].get("mean_gold_error"),
        **{name: ppo[key] if "eval/trained_score" in ppo else None for name, key in GOLD.items()},
    }


def round_line(row: Row) -> str:
    """The figures in words."""
    right = "the reward model is right"
    if row["accuracy_before"] is not None:
        right = (
            f"the last reward model is right on {row['accuracy_before']:.1%} of {row['pairs']} fresh pairs, "
            f"{row['heldout_accuracy_before']:.1%} of held-out ones; the new one"
        )
    gold = ""
    if row["heldout_gold"] is not None:
        after, before = (with_error(row[name], row[f"{name}_error"]) for name in ("heldout_gold", "gold_before"))
        gold = f", gold {after} after {before}"
    return (
        f"{right} on {row['heldout_accuracy']:.1%} of {row['heldout_pairs']} held-out pairs; score "
        f"{row['score']:.3f}, held out {row['heldout_score']:.3f}{gold}; KL {row['kl']:.2f} nats a response"
    )
