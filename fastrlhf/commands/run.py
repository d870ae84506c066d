"""The main job: SFT, labelled pairs, reward model, PPO, evaluation, report.

<output>/data/*.jsonl        prompts of each split, demonstrations
<output>/sft, reward, ppo    what the loops write: model, metrics.jsonl, timing.jsonl
<output>/pairs               train.jsonl and heldout.jsonl, labelled by the gold reward; counts.json
<output>/evaluation          answers.jsonl, summary.json
<output>/report.html
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import torch

from fastrlhf.commands.run_report import describe, write_report
from fastrlhf.data import Prompt, load_prompts, read_rows
from fastrlhf.data.template import load_tokenizer
from fastrlhf.errors import DataError
from fastrlhf.evaluation.answers import Answers, answer, calibration, compare, compare_best_of_n, kl_of_responses
from fastrlhf.evaluation.labels import label_pairs
from fastrlhf.evaluation.stages import Stages, write_tables
from fastrlhf.generation.engine import Sampling
from fastrlhf.models.policy import Policy
from fastrlhf.rewards.scorer import Scorer
from fastrlhf.runtime.atomic_io import write_whole
from fastrlhf.runtime.metrics import MetricsLog
from fastrlhf.runtime.resume_check import check_stage_unchanged
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.settings.run import RunConfig
from fastrlhf.settings.training import RewardConfig, SFTConfig
from fastrlhf.trainers.ppo.trainer import PPO
from fastrlhf.trainers.reward import RewardTrainer
from fastrlhf.trainers.sft import SFT

SPLITS = ("reward", "ppo", "heldout")
PRODUCTS = {  # of each stage, in order
    "data": "data",
    "sft": "sft/model",
    "pairs": "pairs",
    "reward": "reward/model",
    "ppo": "ppo/model",
    "evaluation": "evaluation",
    "report": "report.html",
}
# first seeds of each purpose; PPO's start at 0, so no two draw alike
PAIRS, JUDGED, BEST_OF = 1 << 24, 2 << 24, 3 << 24


class Run(Stages):
    """The main job as an iterator over its stages; each yields its name and a line on what came out.

    for stage, result in Run(RunConfig(output="demo")):
        print(stage, result)

    Raises: what the loops raise; DataError for prompts that are not split, too few, or both held out and trained on."""

    config: RunConfig

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, PRODUCTS, always=("report",))
        loops = {"sft": self.sft_config, "reward": self.reward_config, "ppo": self.ppo_config}
        for name in loops if config.resume else ():
            if (self.output / name).exists():
                check_stage_unchanged(loops[name]())  # nothing is taken of another run in the folder of a stage

    def outcome(self, name: str) -> str:
        """A line on what a finished stage left."""
        return describe(name, self.output)

    def data(self) -> None:
        """Writes the prompts of each split, with the system turn, and the demonstrations."""
        config, shipped = self.config, files("fastrlhf.commands.demo")
        path = str(shipped / "prompts.jsonl") if config.prompts == "shipped" else config.prompts
        splits: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
        for number, row in enumerate(read_texts(path, "prompt", "split"), 1):
            if row["split"] not in SPLITS:
                raise DataError(f"run: {path}, row {number}: split must be {', '.join(SPLITS)}, got {row['split']!r}")
            splits[row["split"]].append({**row, "question": row["prompt"], "prompt": self.turns(row["prompt"])})
        self.check_splits(path, splits)
        path = str(shipped / "demonstrations.jsonl") if config.demonstrations == "shipped" else config.demonstrations
        rows = [{**row, "prompt": self.turns(row["prompt"])} for row in read_texts(path, "prompt", "completion")]
        tables = {f"{name}.jsonl": rows for name, rows in {**splits, "demonstrations": rows}.items()}
        write_whole(self.output / "data", lambda folder: write_tables(folder, tables))

    def turns(self, prompt: str) -> Any:
        """The prompt as messages with the system turn, or as it is without one."""
        if self.config.system is None:
            return prompt
        return [{"role": "system", "content": self.config.system}, {"role": "user", "content": prompt}]

    def check_splits(self, path: str, splits: dict[str, list[dict[str, Any]]]) -> None:
        """Raises DataError for a split that is too small, and for a held-out prompt that is trained on."""
        needed = {"reward": sum(self.num_pair_prompts), "ppo": 1, "heldout": self.config.num_heldout_prompts}
        for name, num in needed.items():
            if len(splits[name]) < num:
                raise DataError(f"run: {path} has {len(splits[name])} prompts of split {name}, but {num} are needed")
        trained_on = {row["question"] for name in ("reward", "ppo") for row in splits[name]}
        for row in splits["heldout"]:
            if row["question"] in trained_on:
                raise DataError(f"run: {path}: the held-out prompt {row['question']!r} is in another split too")

    @property
    def num_pair_prompts(self) -> tuple[int, int]:
        """Prompts whose pairs train the reward model, and prompts whose pairs measure it."""
        each = self.config.pairs_per_prompt
        return -(-self.config.num_pairs // each), -(-self.config.num_heldout_pairs // each)

    def sft(self) -> None:
        """Fine-tunes the model on the demonstrations."""
        SFT(self.sft_config()).run()

    def sft_config(self) -> SFTConfig:
        """The settings of SFT."""
        return SFTConfig(
            model=self.config.model,
            data=str(self.output / "data/demonstrations.jsonl"),
            epochs=self.config.sft_epochs,
            learning_rate=self.config.sft_learning_rate,
            batch_size=10,
            max_length=self.config.max_prompt_tokens + self.config.max_new_tokens,
            **self.loop_options("sft"),
        )

    def pairs(self) -> None:
        """Samples pairs of responses from the SFT policy and lets the gold reward say which is better."""
        config = self.config
        num_train, num_heldout = self.num_pair_prompts
        prompts = [
            prompt for prompt in self.prompts("reward", num_train + num_heldout) for _ in range(config.pairs_per_prompt)
        ]
        asked = [prompt for prompt in prompts for _ in range(2)]
        answers = self.answer(self.policy("sft"), asked, {"gold": self.scorer(config.gold)}, PAIRS)
        rows, counts = label_pairs(answers, [self.turns(prompt.columns["question"]) for prompt in prompts])
        border = num_train * config.pairs_per_prompt
        parts = {"train.jsonl": rows[:border], "heldout.jsonl": rows[border:]}
        tables = {"counts.json": counts, **{name: [row for row in part if row] for name, part in parts.items()}}
        write_whole(self.output / "pairs", lambda folder: write_tables(folder, tables))

    def reward(self) -> None:
        """Trains the reward model on the pairs; its last metrics hold the accuracy on the held-out ones."""
        RewardTrainer(self.reward_config()).run()

    def reward_config(self) -> RewardConfig:
        """The settings of the reward model."""
        return RewardConfig(
            model=str(self.output / "sft/model"),
            data=str(self.output / "pairs/train.jsonl"),
            eval_data=str(self.output / "pairs/heldout.jsonl"),
            epochs=self.config.reward_epochs,
            learning_rate=self.config.reward_learning_rate,
            batch_size=10,
            warmup_ratio=0.1,
            # a response may have more tokens read than sampled
            max_length=self.config.max_prompt_tokens + 2 * self.config.max_new_tokens,
            **self.loop_options("reward"),
        )

    def ppo(self) -> None:
        """Trains the SFT policy against the reward model."""
        PPO(self.ppo_config()).run()

    def ppo_config(self) -> PPOConfig:
        """The settings of PPO, which answers to held-out prompts share."""
        config = self.config
        return PPOConfig(
            model=str(self.output / "sft/model"),
            reward=str(self.output / "reward/model"),
            data=str(self.output / "data/ppo.jsonl"),
            steps=config.steps,
            batch_size=config.batch_size,
            epochs=config.epochs,
            minibatches=config.minibatches,
            learning_rate=config.learning_rate,
            value_learning_rate=config.value_learning_rate,
            # a value model that starts as the reward model calls every unfinished response bad, and does not
            # unlearn it in so few steps; below 1, lam would then credit the last tokens, and the policy stop early
            lam=1.0,
            clip_range_value=10.0,
            schedule="constant",
            warmup_ratio=0.0,
            kl_coef=config.kl_coef,
            max_prompt_tokens=config.max_prompt_tokens,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            save_every=max(1, config.steps // 2),
            **self.loop_options("ppo"),
        )

    def loop_options(self, name: str) -> dict[str, Any]:
        """The settings that the loops share."""
        config, output = self.config, self.output / name
        options = {"output": str(output), "seed": config.seed, "device": config.device, "max_tokens": config.max_tokens}
        return {**options, "resume": output.exists()}  # by an earlier start of this run

    def evaluation(self) -> None:
        """Judges answers to held-out prompts before and after PPO, and best-of-n of the policy before."""
        config, options = self.config, self.ppo_config()
        prompts = self.prompts("heldout", config.num_heldout_prompts)
        some = prompts[: config.num_best_of_prompts]
        policy, sft_policy = self.policy("ppo"), self.policy("sft")
        judges = {"gold": self.scorer(config.gold), "reward": self.scorer(options.reward)}
        asked = prompts * config.answers_per_prompt
        before = self.answer(sft_policy, asked, judges, JUDGED)
        after = self.answer(policy, asked, judges, JUDGED)
        kl = kl_of_responses(policy, sft_policy, after, temperature=config.temperature, max_tokens=config.max_tokens)
        more = self.answer(sft_policy, some * (config.best_of - 1), judges, BEST_OF)
        # (prompts, n): the first answer, which is there already, and n - 1 more
        scores, gold = (
            torch.cat([before.judgements[name][: len(some)], more.judgements[name]]).view(-1, len(some)).T
            for name in ("reward", "gold")
        )
        summary = {
            **compare(before, after, kl, num_prompts=len(prompts)),
            "best_of_n": compare_best_of_n(scores, gold, after.judgements["gold"][: len(some)]),
            "calibration": asdict(calibration(scores, gold)),
        }
        rows = [
            {
                "question": prompt.columns["question"],
                **{f"{name}_before": values[n].item() for name, values in before.judgements.items()},
                **{f"{name}_after": values[n].item() for name, values in after.judgements.items()},
                "kl": kl[n].item(),
                "before": before.texts[n],
                "after": after.texts[n],
            }
            for n, prompt in enumerate(asked)
        ]
        tables = {"answers.jsonl": rows, "summary.json": summary}
        write_whole(self.output / "evaluation", lambda folder: write_tables(folder, tables))

    def report(self) -> None:
        """Writes the report."""
        write_report(self.output)

    def answer(self, policy: Policy, prompts: Sequence[Prompt], judges: dict[str, Scorer], purpose: int) -> Answers:
        """The policy's answers, drawn with seeds that follow from the run's seed and the purpose."""
        first = (self.config.seed << 32) + purpose
        sampling = Sampling(max_new_tokens=self.config.max_new_tokens, temperature=self.config.temperature)
        with MetricsLog.progress("generate", len(prompts) * sampling.max_new_tokens) as advance:
            return answer(
                policy,
                self.tokenizer(),
                prompts,
                judges,
                sampling=sampling,
                seeds=range(first, first + len(prompts)),
                progress=advance,
            )

    def prompts(self, split: str, num: int) -> list[Prompt]:
        """The first prompts of a split."""
        path, longest = self.output / "data" / f"{split}.jsonl", self.config.max_prompt_tokens
        return load_prompts(path, self.tokenizer(), max_prompt_tokens=longest, max_rejected=0.0, limit=num).rows

    def tokenizer(self) -> Any:
        """The tokenizer of every model of the run."""
        return load_tokenizer(str(self.output / "sft/model"))

    def policy(self, name: str) -> Policy:
        """The policy that a stage left, to sample from."""
        options, path = self.ppo_config(), self.output / PRODUCTS[name]
        device, autocast = options.resolve_device(), options.autocast_dtype()
        return Policy.from_pretrained(path, device=device, autocast=autocast, freeze=True)

    def scorer(self, reward: Any) -> Scorer:
        """A judge: a reward model's folder, module:function or URL."""
        options = self.ppo_config()
        device, autocast = options.resolve_device(), options.autocast_dtype()
        limits: dict[str, Any] = {"max_tokens": options.max_tokens, "reward_timeout": self.config.reward_timeout}
        return Scorer(reward, self.tokenizer(), device=device, autocast=autocast, **limits)


def read_texts(path: str, *columns: str) -> list[dict[str, Any]]:
    """The rows of a file; raises DataError for one without these columns, as text."""
    rows = []
    for number, row in read_rows(path):
        for column in columns:
            if not isinstance(row.get(column), str):
                raise DataError(f"run: {path}, row {number}: expected text in column {column}, got {row.get(column)!r}")
        rows.append(row)
    return rows
