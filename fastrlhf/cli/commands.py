"""The table of commands: what each does, its settings, where it stands and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastrlhf.settings.best_of_n import BestOfNConfig, OveroptimizeConfig, SweepConfig
from fastrlhf.settings.data import DataCheckConfig, DataConvertConfig
from fastrlhf.settings.feedback import IterateConfig, LabelConfig, ReviseConfig
from fastrlhf.settings.info import CheckConfig, InfoConfig
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.settings.run import RunConfig
from fastrlhf.settings.training import DPOConfig, KTOConfig, RewardConfig, SFTConfig
from fastrlhf.settings.trust import EvaluateRewardConfig

LOOP_PRODUCTS = {"model": "model", "metrics": "metrics.jsonl"}


@dataclass(frozen=True)
class Command:
    """A command of the line.

    help: what it does; config: its settings; source: "module:name" of what is made from them, an iterator whose texts
    are printed; products: what it leaves in its output folder, by name"""

    help: str
    config: type
    source: str
    products: dict[str, str] = field(default_factory=lambda: LOOP_PRODUCTS)


RUN_PRODUCTS = {
    "checkpoint": "ppo/model",
    "reward model": "reward/model",
    "metrics": "ppo/metrics.jsonl",
    "evaluation": "evaluation/summary.json",
    "report": "report.html",
}
LABELS = {"pairs": "pairs.jsonl", "summary": "summary.json"}
REVISIONS = {"demonstrations": "demonstrations.jsonl", "summary": "summary.json"}
COMMANDS = {
    "sft": Command("fine-tune a model on demonstrations", SFTConfig, "trainers.sft:SFT"),
    "reward": Command(
        "train a reward model on responses that were judged", RewardConfig, "trainers.reward:RewardTrainer"
    ),
    "ppo": Command("train a model against a reward, with PPO", PPOConfig, "trainers.ppo.trainer:PPO"),
    "dpo": Command(
        "train a model on preferences directly (DPO, IPO, SimPO, ORPO, ...)",
        DPOConfig,
        "trainers.kto:preference_trainer",
    ),
    "kto": Command("train a model on labelled responses directly (KTO)", KTOConfig, "trainers.kto:KTO"),
    "evaluate reward": Command(
        "how far a reward model can be trusted: a page and JSON",
        EvaluateRewardConfig,
        "commands.reward_report.command:EvaluateReward",
        {"report": "report.html", "figures": "summary.json", "scores": "scores.jsonl"},
    ),
    "label": Command(
        "label pairs of responses by a judge model and a rubric", LabelConfig, "commands.feedback.label:Label", LABELS
    ),
    "revise": Command(
        "have a model criticise and revise its responses", ReviseConfig, "commands.feedback.revise:Revise", REVISIONS
    ),
    "iterate": Command(
        "rounds: fresh labels of the policy so far, a reward model from all of them, PPO",
        IterateConfig,
        "commands.feedback.iterate:Iterate",
        {},
    ),
    "run": Command(
        "all of it: sft, pairs, reward model, ppo, evaluation, report; without options a demo",
        RunConfig,
        "commands.run:Run",
        RUN_PRODUCTS,
    ),
    "data check": Command(
        "what a file of rows holds, and what in it may harm", DataCheckConfig, "commands.data_check:check", {}
    ),
    "data convert": Command(
        "another format's file as rows of ours", DataConvertConfig, "commands.data_convert:convert", {}
    ),
    "best-of-n": Command(
        "keep the best of n responses to each prompt; estimate best-of-k for all k",
        BestOfNConfig,
        "commands.best_of_n:best_of_n",
        {"best responses": "best.jsonl", "all of them": "candidates.jsonl", "summary": "summary.json"},
    ),
    "sweep": Command(
        "the trade-off of two rewards over weights, by best-of-n and PPO",
        SweepConfig,
        "commands.sweep:sweep",
        {"points": "sweep.csv", "summary": "sweep.json"},
    ),
    "overoptimize": Command(
        "a proxy learned from a gold reward, and how both go while best-of-n and PPO push it",
        OveroptimizeConfig,
        "commands.overoptimize:Overoptimize",
        {"points": "points.csv", "summary": "summary.json", "report": "report.html"},
    ),
    "info": Command(
        "versions, devices, and what serves each op; --model: which layers of a model are fast",
        InfoConfig,
        "cli.info:info",
        {},
    ),
    "check": Command(
        "every op against its float64 reference on this machine, with error, time and per cent of its limits",
        CheckConfig,
        "cli.check:check",
        {},
    ),
}
