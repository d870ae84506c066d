"""`fastrlhf iterate`: rounds of fresh labels, a reward model from all of them, and PPO from the last policy.

<output>/data               prompts.jsonl, to label and train on; heldout.jsonl, to measure on; comparisons.jsonl
<output>/round-1, ...
  pairs                     train.jsonl and heldout.jsonl: two responses of the policy so far to each prompt, labelled;
                            counts.json, with what the last reward model says of these pairs
  labels                    with a judge: what `fastrlhf label` leaves
  comparisons.jsonl         what this round's reward model learns from
  reward, ppo               what the loops leave
<output>/summary.json       a row a round
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fastrlhf.commands.feedback.label import Label
from fastrlhf.commands.feedback.rounds import accuracy, last_evaluated, round_line, round_row
from fastrlhf.commands.feedback.rows import (
    FeedbackRow,
    Row,
    as_pair,
    as_prompt,
    as_text,
    check_rejection_rate,
    read_items,
)
from fastrlhf.data import SPLIT, Prompt, Rejected, batch_rows, shuffled
from fastrlhf.data.template import Renderer, load_tokenizer
from fastrlhf.errors import DataError
from fastrlhf.evaluation.answers import answer
from fastrlhf.evaluation.html import reward_model_line
from fastrlhf.evaluation.labels import label_pairs
from fastrlhf.evaluation.stages import Stages, write_tables
from fastrlhf.generation.engine import Sampling
from fastrlhf.models.policy import Policy
from fastrlhf.rewards.scorer import Scorer
from fastrlhf.runtime import distributed
from fastrlhf.runtime.atomic_io import write_json, write_whole
from fastrlhf.runtime.jsonl import read_jsonl, write_jsonl
from fastrlhf.runtime.metrics import MetricsLog
from fastrlhf.runtime.resume_check import check_stage_unchanged
from fastrlhf.settings.feedback import MAX_ROUNDS, IterateConfig, JudgeConfig, LabelConfig
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.settings.training import RewardConfig
from fastrlhf.settings.values import field_types
from fastrlhf.settings.yaml_file import read_further
from fastrlhf.stats.means import Mean
from fastrlhf.trainers.ppo.trainer import PPO
from fastrlhf.trainers.reward import RewardTrainer

STAGES = {"pairs": "pairs", "reward": "reward/model", "ppo": "ppo/model"}  # of a round, and what each leaves
TAKEN = ("model", "data", "eval_data", "output", "resume", "overwrite")  # settings of a loop that no file may change
TAKEN_OF_PPO = (*TAKEN, "reward", "reference", "eval_reward", "eval_every")
PPO_SEED, TRAIN_SEED, HELD_OUT_SEED = range(3)  # what draws in a round


class Iterate(Stages):
    """The rounds as an iterator over their stages; each yields its name and a line on what came out.

    Raises: what the loops, `Label` and loading raise; DataError for too few prompts."""

    config: IterateConfig
    passing = ("checkpoints", "best")  # the best policy of a round is its last, which is its model

    def __init__(self, config: IterateConfig) -> None:
        products = {"data": "data"}
        for number in range(1, config.rounds + 1):
            products |= {f"round-{number}/{stage}": f"round-{number}/{left}" for stage, left in STAGES.items()}
        products["summary"] = "summary.json"
        earlier = [path.name for path in Path(config.output).glob("round-*")]
        super().__init__(config, products, always=("summary",), ours=earlier)
        self.tokenizer = load_tokenizer(config.model)
        self.renderer = Renderer(self.tokenizer, config.template, config.template_kwargs)
        self.further = {
            "reward": read_further(RewardConfig, config.reward, taken=TAKEN),
            "ppo": read_further(PPOConfig, config.ppo, taken=TAKEN_OF_PPO),
        }
        for number in range(1, config.rounds + 1):
            loops = self.reward_config(number), self.ppo_config(number)  # refuse what they refuse now, not after labels
            for loop in loops if config.resume else ():
                check_stage_unchanged(loop)
        options = config.model_options()
        placing = {name: options[name] for name in ("device", "autocast")}
        self.tables = self.read()
        self.judges = {}  # the gold function, where it labels
        if config.gold is not None:
            parts = (self.tables[f"{name}.jsonl"] for name in ("prompts", "heldout"))
            columns = {name for rows in parts for row in rows for name in row} - {"prompt"}
            placing |= {"max_tokens": config.max_tokens, **config.reward_options()}
            self.judges["gold"] = Scorer(config.gold, self.tokenizer, columns=columns, **placing)

    def read(self) -> dict[str, list[Row]]:
        """The tables of the data stage. Raises: DataError for rows that cannot be used, or too few."""
        config, chat = self.config, self.renderer.chat
        items, report = read_items(config.data, limit=None, bare=True, chat=chat)
        kept = []
        for item in items:
            try:
                as_prompt(item, self.renderer, config.max_prompt_tokens)
                kept.append(item)
            except Rejected as rejected:
                report.reject(item.number, rejected.reason, rejected.detail)
        check_rejection_rate(report, config.max_rejected)
        if len(kept) <= config.num_heldout:
            raise DataError(f"data: {config.data} has {len(kept)} prompts, of which {config.num_heldout} are held out")
        distributed.print_once(report)
        rows = [{**kept[n].columns, "prompt": kept[n].prompt} for n in shuffled(len(kept), config.seed, purpose=SPLIT)]
        held_out = rows[: config.num_heldout]
        tables = {"heldout.jsonl": held_out, "prompts.jsonl": rows[config.num_heldout :]}
        if config.comparisons is not None:
            pairs, report = read_items(config.comparisons, limit=None, bare=False, chat=chat)
            check_rejection_rate(report, config.max_rejected)
            if unlabelled := [item.number for item in pairs if not item.labelled]:
                raise DataError(f"comparisons: {config.comparisons}, row {unlabelled[0]}: no chosen and rejected")
            distributed.print_once(report)
            tables["comparisons.jsonl"] = [as_pair(item) for item in pairs]
        texts = {as_text(row["prompt"]) for row in held_out}
        for name in [name for name in tables if name != "heldout.jsonl"]:
            apart = [row for row in tables[name] if as_text(row["prompt"]) not in texts]
            if len(apart) < len(tables[name]):
                distributed.print_once(
                    f"{name}: {len(tables[name]) - len(apart)} rows have a held-out prompt, and are left out"
                )
            tables[name] = apart
        if not tables["prompts.jsonl"]:
            raise DataError(f"data: {config.data} has no prompt but those held out")
        return tables

    def do(self, name: str) -> None:
        """Does a stage, of a round or of the whole."""
        where, _, stage = name.rpartition("/")
        if where:
            getattr(self, stage)(int(where.removeprefix("round-")))
        else:
            getattr(self, name)()

    def data(self) -> None:
        """Writes the prompts, those to measure on apart."""
        write_whole(self.output / "data", lambda folder: write_tables(folder, self.tables))

    def pairs(self, number: int) -> None:
        """Has the policy so far answer prompts twice, has the pairs labelled, and asks the last reward model."""
        config, folder = self.config, self.round_folder(number)
        prompts, heldout = (read_jsonl(self.output / f"data/{name}.jsonl") for name in ("prompts", "heldout"))
        chosen = [prompts[n] for n in batch_rows(len(prompts), config.num_pairs, number - 1, seed=config.seed)]
        label = self.by_gold if self.judges else self.by_judge
        parts, counts = {}, {}
        for name, rows in (("train", chosen), ("heldout", heldout)):
            parts[name], counts[name] = label(number, name, rows)
            if not parts[name]:
                raise DataError(f"round {number}: no pair of {name} prompts is left; of {counts[name]}")

        def write(made: Path) -> None:
            write_tables(made, {f"{name}.jsonl": rows for name, rows in parts.items()})
            if number > 1:
                last = self.round_folder(number - 1) / "reward/model"
                measure = partial(accuracy, self.config, last, max_length=self.reward_config(1).max_length)
                counts["accuracy_before"] = {name: measure(made / f"{name}.jsonl") for name in parts}
            write_tables(made, {"counts.json": counts})

        write_whole(folder / "pairs", write)

    def by_gold(self, number: int, name: str, rows: Sequence[Row]) -> tuple[list[Row], Row]:
        """The pairs that the gold function labels, and how many there were and what became of the others."""
        config = self.config
        policy = Policy.from_pretrained(self.policy(number), freeze=True, **config.model_options())
        prompts: list[Prompt] = []
        for row in rows:
            columns = {key: value for key, value in row.items() if key != "prompt"}
            prompts += [
                as_prompt(FeedbackRow(0, row["prompt"], columns=columns), self.renderer, config.max_prompt_tokens)
            ] * 2
        first = self.seed(number, HELD_OUT_SEED if name == "heldout" else TRAIN_SEED) << 32
        sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
        with MetricsLog.progress("answer", len(prompts) * config.max_new_tokens) as done:
            answers = answer(
                policy,
                self.tokenizer,
                prompts,
                self.judges,
                sampling=sampling,
                seeds=range(first, first + len(prompts)),
                progress=done,
            )
        pairs, counts = label_pairs(answers, [row["prompt"] for row in rows])
        of_prompts = Mean.of(answers.judgements["gold"].view(-1, 2).mean(1))
        return [{**pair, "rater": "gold"} for pair in pairs if pair], {**counts, **of_prompts.named("mean_gold")}

    def by_judge(self, number: int, name: str, rows: Sequence[Row]) -> tuple[list[Row], Row]:
        """The pairs that the judge labels, with its summary; a labelling that was stopped goes on."""
        folder = self.round_folder(number) / "labels" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder.with_name(f"{name}_prompts.jsonl"), rows)
        shared = {key: getattr(self.config, key) for key in field_types(JudgeConfig)}
        shared |= {
            "data": str(folder.with_name(f"{name}_prompts.jsonl")),
            "policy": str(self.policy(number)),
            "output": str(folder),
            "seed": self.seed(number, HELD_OUT_SEED if name == "heldout" else TRAIN_SEED),
        }
        shared |= {"resume": folder.exists(), "overwrite": False}
        for line in Label(LabelConfig(**shared)):
            distributed.print_once(line)
        return read_jsonl(folder / "pairs.jsonl"), json.loads((folder / "summary.json").read_text(encoding="utf-8"))

    def reward(self, number: int) -> None:
        """Trains a reward model, from the SFT model, on the comparisons so far."""
        self.write_comparisons(number)
        RewardTrainer(self.reward_config(number)).run()

    def write_comparisons(self, number: int) -> None:
        """Writes what the reward model of a round learns from."""
        rounds = range(1, number + 1) if self.config.mix == "all" else [number]
        paths = [self.round_folder(n) / "pairs/train.jsonl" for n in rounds]
        if self.config.comparisons is not None:
            paths.insert(0, self.output / "data/comparisons.jsonl")
        rows = [row for path in paths for row in read_jsonl(path)]
        write_jsonl(self.round_folder(number) / "comparisons.jsonl", rows)

    def reward_config(self, number: int) -> RewardConfig:
        """The settings of a round's reward model."""
        config, folder = self.config, self.round_folder(number)
        settings = {
            "epochs": config.reward_epochs,
            "learning_rate": config.reward_learning_rate,
            "batch_size": config.reward_batch_size,
            # a response may have more tokens read than sampled
            "max_length": config.max_prompt_tokens + 2 * config.max_new_tokens,
            **self.shared(folder / "reward"),
            **self.further["reward"],
            "model": config.model,
            "data": str(folder / "comparisons.jsonl"),
            "eval_data": str(folder / "pairs/heldout.jsonl"),
        }
        return RewardConfig(**settings)

    def ppo(self, number: int) -> None:
        """Trains the policy on from where the last round left it; the KL penalty is to the SFT model."""
        trainer = PPO(self.ppo_config(number))
        trainer.evaluates_start = False  # its answers to held-out prompts are scored among the pairs
        trainer.run()

    def ppo_config(self, number: int) -> PPOConfig:
        """The settings of a round's PPO."""
        config, folder = self.config, self.round_folder(number)
        settings = {
            "steps": config.steps,
            "batch_size": config.batch_size,
            "minibatches": config.minibatches,
            "learning_rate": config.learning_rate,
            "kl_coef": config.kl_coef,
            "max_prompt_tokens": config.max_prompt_tokens,
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "save_every": max(1, config.steps // 2),
            **self.shared(folder / "ppo"),
            **config.reward_options(),
            "seed": self.seed(number, PPO_SEED),
            **self.further["ppo"],
            "model": str(self.policy(number)),
            "reference": config.model,
            "reward": str(folder / "reward/model"),
            "data": str(self.output / "data/prompts.jsonl"),
            "eval_data": str(self.output / "data/heldout.jsonl"),
        }
        settings["eval_every"] = settings["steps"]  # so that the last model is the one that is measured
        return PPOConfig(**settings, eval_reward=config.gold)

    def shared(self, output: Path) -> Row:
        """The settings that the loops share."""
        names = ("template", "template_kwargs", "max_tokens", "max_rejected", "seed", "device", "dtype")
        own = {name: getattr(self.config, name) for name in names}
        return {**own, "output": str(output), "resume": output.exists()}  # by an earlier start of this job

    def round_folder(self, number: int) -> Path:
        """The folder of a round."""
        return self.output / f"round-{number}"

    def policy(self, number: int) -> str:
        """The policy that a round begins with."""
        return self.config.model if number == 1 else str(self.round_folder(number - 1) / "ppo/model")

    def seed(self, number: int, what: int) -> int:
        """A seed of its own for each thing that draws in a round, and of no other round of a job with another seed."""
        return ((MAX_ROUNDS + 1) * 3 * self.config.seed + 3 * number + what) % 2**31

    def summary(self) -> None:
        """Writes a row a round."""
        numbers = range(1, self.config.rounds + 1)
        rows = [{"round": number, **round_row(self.round_folder(number))} for number in numbers]
        write_json(self.output / "summary.json", {"rounds": rows})

    def outcome(self, name: str) -> str:
        """A line on what a finished stage left; after PPO, on the whole round."""
        where, _, stage = name.rpartition("/")
        folder = self.output / where
        if name == "data":
            return ", ".join(f"{len(read_jsonl(path))} {path.stem}" for path in sorted((self.output / name).iterdir()))
        if name == "summary":
            return str(self.output / "summary.json")
        if stage == "pairs":
            nums = {part: len(read_jsonl(folder / f"pairs/{part}.jsonl")) for part in ("train", "heldout")}
            return f"{nums['train']} pairs, {nums['heldout']} of held-out prompts"
        if stage == "reward":
            if not (folder / "comparisons.jsonl").exists():  # it was deleted since
                self.write_comparisons(int(where.removeprefix("round-")))
            return reward_model_line(last_evaluated(folder))
        return round_line(round_row(folder))
