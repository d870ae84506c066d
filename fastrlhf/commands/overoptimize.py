"""Over-optimisation: a gold reward labels pairs, a proxy is trained on them, best-of-n and PPO push against the proxy.

A stage's product is complete or not there, so a run that was stopped goes on with the first stage whose product is
missing, and a loop with its newest checkpoint.

<output>/pairs              train.jsonl and heldout.jsonl, other prompts, labelled by the gold reward; counts.json
<output>/proxy, ppo         what the loops write
<output>/best_of_n          candidates.jsonl: n responses to each held-out prompt, judged by both
<output>/best_of_n.json, ppo.json   points: KL, gold and proxy with standard errors
<output>/points.csv, summary.json, curves.svg, report.html

Source: Gao, Schulman and Hilton, arXiv 2210.10760.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

from fastrlhf.commands.best_of_n import OURS as CANDIDATES
from fastrlhf.commands.best_of_n import best_of_k, candidates, curve, moments, prompts_of, scores_of
from fastrlhf.commands.overoptimize_report import describe, efforts, write_report
from fastrlhf.data.template import load_tokenizer
from fastrlhf.errors import DataError, UserError
from fastrlhf.evaluation.answers import answer, kl_of_responses
from fastrlhf.evaluation.labels import label_pairs, split_by_prompt
from fastrlhf.evaluation.stages import Stages, write_tables
from fastrlhf.generation.engine import Sampling
from fastrlhf.models.policy import Policy
from fastrlhf.rewards.scorer import Scorer
from fastrlhf.runtime import distributed
from fastrlhf.runtime.atomic_io import write_json, write_whole
from fastrlhf.runtime.output_folder import OutputFolder
from fastrlhf.runtime.resume_check import check_stage_unchanged
from fastrlhf.settings.best_of_n import SHARED, OveroptimizeConfig
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.settings.training import RewardConfig
from fastrlhf.settings.yaml_file import read_further
from fastrlhf.stats.means import Mean
from fastrlhf.trainers.ppo.trainer import PPO
from fastrlhf.trainers.reward import RewardTrainer

PRODUCTS = {  # of each stage, in order
    "pairs": "pairs",
    "proxy": "proxy/model",
    "best_of_n": "best_of_n.json",
    "ppo": "ppo.json",
    "report": "report.html",
}
OURS = ("best_of_n", "ppo", "points.csv", "summary.json", "curves.svg")
TAKEN = ("model", "data", "reward", "output", "resume", "overwrite", "temperature")  # of PPO, that no file may change
HELD_OUT = 0.1  # share of the pairs, on prompts of their own, that the proxy is measured on
# first seeds of each purpose; PPO's start at 0 and best-of-n's too, of other prompts
PAIRS, MEASURED = 1 << 24, 2 << 24


class Overoptimize(Stages):
    """The study as an iterator over its stages; each yields its name and a line on what came out.

    Raises: what loading and the loops raise; ValueError where the gold reward ties all pairs, or those of all prompts
    but one."""

    config: OveroptimizeConfig

    def __init__(self, config: OveroptimizeConfig) -> None:
        super().__init__(config, PRODUCTS, always=("report",), ours=OURS)
        self.tokenizer = load_tokenizer(config.model)
        self.data = prompts_of(config, self.tokenizer)
        if len({tuple(prompt.tokens) for prompt in self.data[: config.num_pairs]}) < 2:
            raise DataError(f"data: {config.data} has one prompt; the proxy learns from some and is measured on others")
        self.held_out = prompts_of(self.of_held_out(), self.tokenizer, least=2)
        seen = {tuple(prompt.tokens) for prompt in self.data}
        if shared := sum(tuple(prompt.tokens) in seen for prompt in self.held_out):
            distributed.print_once(
                f"warning: {shared} of the {len(self.held_out)} prompts of {config.eval_data} are trained on too"
            )
        self.further = read_further(PPOConfig, config.ppo, taken=TAKEN)
        loop = self.ppo_config()  # refuses what it refuses now, and not after the proxy is trained
        if config.resume:
            check_stage_unchanged(loop)
        device, autocast = config.resolve_device(), config.autocast_dtype()
        columns = [{name for prompt in prompts for name in prompt.columns} for prompts in (self.data, self.held_out)]
        self.gold = Scorer(
            config.gold,
            self.tokenizer,
            max_tokens=config.max_tokens,
            columns=set.union(*columns),
            device=device,
            autocast=autocast,
            **config.reward_options(),
        )
        for names in columns:  # what one file lacks is told now, and not when it is read
            self.gold.check_columns(names)

    def outcome(self, name: str) -> str:
        """A line on what a finished stage left."""
        return describe(name, self.output)

    def pairs(self) -> None:
        """Samples pairs of responses of the policy and lets the gold reward say which is better."""
        config = self.config
        prompts = [self.data[n % len(self.data)] for n in range(config.num_pairs)]
        asked = [prompt for prompt in prompts for _ in range(2)]
        first = (config.seed << 32) + PAIRS
        seeds = range(first, first + len(asked))
        answers = answer(
            self.policy(),
            self.tokenizer,
            asked,
            {"gold": self.gold},
            sampling=self.sampling(),
            seeds=seeds,
            max_slots=config.max_slots,
        )
        labelled, counts = label_pairs(answers, [prompt.turns for prompt in prompts])
        rows, draws = [row for row in labelled if row], random.Random(config.seed)
        for row in rows:
            if draws.random() < config.flip:
                turned = {"chosen": "rejected", "rejected": "chosen"}
                row |= {name.replace(a, b): row[name] for a, b in turned.items() for name in list(row) if a in name}
        if not rows:
            raise UserError(f"gold: {config.gold} ties {counts['ties']} of {config.num_pairs} pairs")
        train, held_out = split_by_prompt(rows, HELD_OUT)
        tables = {"train.jsonl": train, "heldout.jsonl": held_out, "counts.json": counts}
        write_whole(self.output / "pairs", lambda folder: write_tables(folder, tables))

    def proxy(self) -> None:
        """Trains the proxy on the pairs, but for those held out."""
        config = self.config
        trainer = RewardTrainer(
            RewardConfig(
                model=config.proxy or config.model,
                data=str(self.output / "pairs/train.jsonl"),
                eval_data=str(self.output / "pairs/heldout.jsonl"),
                epochs=config.reward_epochs,
                batch_size=config.reward_batch_size,
                learning_rate=config.reward_learning_rate,
                # a response may have more tokens read than sampled
                max_length=config.max_prompt_tokens + 2 * config.max_new_tokens,
                **self.shared("proxy"),
            )
        )
        trainer.run()

    def best_of_n(self) -> None:
        """Judges n responses of the policy to each held-out prompt by both rewards."""
        folder = self.output / "best_of_n"
        config = replace(self.of_held_out(), output=str(folder), resume=folder.exists(), overwrite=False)
        judges = {"proxy": str(self.output / "proxy/model"), "gold": self.config.gold}
        rows = candidates(config, judges, OutputFolder(config, CANDIDATES))
        scores = {name: scores_of(rows, name) for name in ("proxy", "gold")}
        points, gold = curve(scores["proxy"], scores), best_of_k(scores["proxy"], scores["gold"])
        for k in efforts(len(points)):
            points[k - 1]["gold_of_prompts"] = gold[:, k - 1].tolist()
        self.write("best_of_n.json", {"points": points, "moments": moments(rows)})

    def ppo(self) -> None:
        """Trains the policy against the proxy, and measures it on held-out prompts after every eval_every steps."""
        trainer, path = PPO(self.ppo_config()), self.output / "ppo/points.json"
        points = json.loads(path.read_text())["points"] if path.exists() else []
        points = [point for point in points if point["step"] <= trainer.num_steps_done]
        with trainer:
            while True:
                step = trainer.num_steps_done
                due = step % self.config.eval_every == 0 or step == trainer.num_steps
                if due and step not in [point["step"] for point in points]:
                    points.append({"step": step, **self.measure(trainer)})
                    self.write("ppo/points.json", {"points": points})
                if next(trainer, None) is None:
                    break
        self.write("ppo.json", {"points": points})

    def measure(self, trainer: PPO) -> dict[str, Any]:
        """KL, proxy and gold of the policy's answers to the held-out prompts, with standard errors; gold of each."""
        config, policy = self.config, trainer.policy
        first = (config.seed << 32) + MEASURED
        answers = answer(
            policy,
            self.tokenizer,
            self.held_out,
            {"proxy": trainer.scorer, "gold": self.gold},
            sampling=self.sampling(),
            seeds=range(first, first + len(self.held_out)),
            max_slots=config.max_slots,
        )
        kl = kl_of_responses(
            policy, trainer.reference, answers, temperature=config.temperature, max_tokens=config.max_tokens
        )
        point: dict[str, Any] = {"gold_of_prompts": answers.judgements["gold"].tolist()}
        for name, values in {"kl": kl, **answers.judgements}.items():
            mean = Mean.of(values)
            point |= {name: mean.mean, f"{name}_error": mean.error}
        return point

    def report(self) -> None:
        """Fits the forms; writes tables, plot and page."""
        write_report(self.output)

    def ppo_config(self) -> PPOConfig:
        """The settings of PPO; those of the YAML file win."""
        config = self.config
        names = ["steps", "batch_size", "learning_rate", "value_learning_rate", "kl_coef"]
        names += ["model", "data", "limit", "max_prompt_tokens", "max_new_tokens", "temperature"]
        options = {
            "reward": str(self.output / "proxy/model"),
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "save_every": config.eval_every,
            **{name: getattr(config, name) for name in names},
        }
        return PPOConfig(**{**options, **self.shared("ppo"), **self.further})

    def shared(self, stage: str) -> dict[str, Any]:
        """The settings that both loops share with this."""
        folder, names = self.output / stage, set(SHARED) - {"model", "data", "limit"}
        given = {name: getattr(self.config, name) for name in names}
        return {**given, "output": str(folder), "resume": folder.exists()}  # by an earlier start of this run

    def of_held_out(self) -> OveroptimizeConfig:
        """The settings with the held-out prompts for data."""
        return replace(self.config, data=self.config.eval_data, limit=self.config.eval_limit)

    def sampling(self) -> Sampling:
        return Sampling(max_new_tokens=self.config.max_new_tokens, temperature=self.config.temperature)

    def policy(self) -> Policy:
        device, autocast = self.config.resolve_device(), self.config.autocast_dtype()
        return Policy.from_pretrained(self.config.model, device=device, autocast=autocast, freeze=True)

    def write(self, name: str, table: Any) -> None:
        write_json(self.output / name, table)
