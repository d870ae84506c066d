"""What the campaign runs: commands on tiny models, on two sets of rows, so that an old run differs from a new one."""

from __future__ import annotations

import contextlib
import io
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from loops import demonstrations, model_folder, pairs, word, write_rows
from tiny import tiny_tokenizer

from fastrlhf import SFT, SFTConfig
from fastrlhf.models.policy import RewardModel

REWARDS = """
def low(prompts, responses, *, response_ids, **_):
    return [sum(token < 130 for token in ids) / max(1, len(ids)) for ids in response_ids]


def gold(prompts, responses, *, response_ids, **_):
    return [sum(token % 7 for token in ids) / 10 for ids in response_ids]
"""
TUNING = "--model base --batch-size 8 --save-every 2 --max-length 64 --learning-rate 1e-3"
PPO = (
    "ppo --model base --data {rows}/prompts.jsonl --steps 6 --batch-size 8 --minibatches 2 --epochs 2 "
    "--max-new-tokens 8 --save-every 2 --eval-data {rows}/held_out.jsonl --learning-rate 1e-3"
)
JUDGE = "--judge judge --min-mass 0 --judge-batch 4 --max-new-tokens 8"
ITERATE = (
    "iterate --model base --data {rows}/prompts.jsonl --gold fault_rewards:gold --rounds 2 --num-pairs 12 "
    "--num-heldout 6 --steps 2 --batch-size 8 --minibatches 1 --max-new-tokens 8 --reward-batch-size 6"
)
RUN = (
    "run --model base --gold fault_rewards:gold --prompts {rows}/splits.jsonl --system none "
    "--demonstrations {rows}/demonstrations.jsonl --num-pairs 12 --num-heldout-pairs 6 --pairs-per-prompt 1 --steps 4 "
    "--batch-size 8 --minibatches 2 "
    "--max-new-tokens 8 --num-heldout-prompts 8 --num-best-of-prompts 4 --sft-epochs 1 --learning-rate 1e-3"
)
COMMANDS = {
    "sft": f"sft {TUNING} --data {{rows}}/demonstrations.jsonl --epochs 2 --eval-fraction 0.2",
    "reward": f"reward {TUNING} --data {{rows}}/pairs.jsonl --eval-fraction 0.2",
    "ppo": f"{PPO} --reward reward --eval-every 2",
    "dpo": f"dpo {TUNING} --data {{rows}}/pairs.jsonl --eval-fraction 0.2",
    "lora": f"{PPO} --reward reward --lora-rank 4",
    "label": f"label {JUDGE} --policy base --data {{rows}}/prompts.jsonl",
    "best-of-n": "best-of-n --model base --data {rows}/prompts.jsonl --reward reward --n 64 --max-new-tokens 6 "
    "--gold fault_rewards:gold --keep-unfinished",
    "run": RUN,
    "grpo": f"{PPO} --reward fault_rewards:low --estimator grpo --samples-per-prompt 4 --eval-every 1",
    "kto": f"dpo --loss kto {TUNING} --data {{rows}}/labels.jsonl",
    "revise": "revise --model tuned/model --data {rows}/prompts.jsonl --rounds 2 --max-new-tokens 24 --max-rejected 1 "
    "--template none",
    "iterate": ITERATE,
    "evaluate": "evaluate reward --model reward --data {rows}/pairs.jsonl --no-plots",
}
JOBS = ("run", "iterate")  # of several loops
RANKS = {"sft x 2": 2, "ppo x 2": 2}  # processes of a run, as torchrun starts them
COMMANDS |= {name: COMMANDS[name.partition(" ")[0]] for name in RANKS}
GOES_ON = {"evaluate": "--overwrite"}  # how a stopped run goes on; the others with --resume
READS_MODELS = {"sft": [("--model", "base")], "ppo": [("--reward", "reward")]}  # of which each file is damaged
# options with which a command reads what --overwrite would delete
READS_ITS_OWN = {
    **dict.fromkeys(("sft", "reward", "ppo", "dpo", "grpo", "kto"), "--model {out}/model"),
    "label": "--data {out}/pairs.jsonl",
    "best-of-n": "--data {out}/best.jsonl",
    "run": "--model {out}/sft/model",
    "revise": "--data {out}/demonstrations.jsonl",
}


@dataclass(frozen=True)
class OfRows:
    """A short run of a command on a file of rows. file: of good ones; text: a column of texts in it"""

    file: str
    text: str
    command: str


SHORT = "--batch-size 8 --max-length 64 --epochs 1 --save-every 0 --model base"
SHORT_PPO = "--steps 1 --batch-size 8 --minibatches 1 --epochs 1 --max-new-tokens 4 --save-every 0 --model base"
OF_ROWS = {
    "sft": OfRows("demonstrations.jsonl", "completion", f"sft {SHORT} --data {{path}}"),
    "reward": OfRows("pairs.jsonl", "chosen", f"reward {SHORT} --data {{path}}"),
    "dpo": OfRows("pairs.jsonl", "rejected", f"dpo {SHORT} --data {{path}}"),
    "kto": OfRows("labels.jsonl", "completion", f"dpo --loss kto {SHORT} --data {{path}}"),
    "ppo": OfRows("prompts.jsonl", "prompt", f"ppo {SHORT_PPO} --reward fault_rewards:low --data {{path}}"),
    "label": OfRows("prompts.jsonl", "prompt", f"label {JUDGE} --policy base --data {{path}}"),
    "best-of-n": OfRows(
        "prompts.jsonl",
        "prompt",
        "best-of-n --model base --reward reward --n 2 --max-new-tokens 4 --keep-unfinished --data {path}",
    ),
    "revise": OfRows(
        "prompts.jsonl",
        "prompt",
        "revise --model tuned/model --rounds 1 --max-new-tokens 8 --template none --max-rejected 1 --data {path}",
    ),
    "evaluate": OfRows("pairs.jsonl", "chosen", "evaluate reward --model reward --no-plots --data {path}"),
    "data check": OfRows("demonstrations.jsonl", "completion", "data check {path}"),
}


def make_inputs(folder: Path) -> None:
    """Writes models and rows."""
    for seed, name in enumerate(("base", "judge")):
        torch.manual_seed(seed)
        model_folder(folder / name, max_position_embeddings=1024)
    torch.manual_seed(2)
    RewardModel.from_pretrained(folder / "base", new_head=True).save_pretrained(folder / "reward")
    tiny_tokenizer().save_pretrained(folder / "reward")
    (folder / "fault_rewards.py").write_text(REWARDS)
    for seed, name in enumerate(("old", "new")):
        rows = folder / name
        rows.mkdir()
        demonstrations(rows / "demonstrations.jsonl", 48, seed)
        pairs(rows / "pairs.jsonl", 48, seed)
        rng = random.Random(seed)
        words = [word(rng, "abcdefgh", rng.randint(4, 9)) for _ in range(72)]
        write_rows(rows / "prompts.jsonl", [{"prompt": text} for text in words[:32]])
        write_rows(rows / "held_out.jsonl", [{"prompt": text} for text in words[32:40]])
        labels = [{"prompt": text, "completion": text[::-1], "label": bool(n % 2)} for n, text in enumerate(words)]
        write_rows(rows / "labels.jsonl", labels)
        splits = ("reward", "ppo", "heldout")
        write_rows(rows / "splits.jsonl", [{"prompt": text, "split": splits[n % 3]} for n, text in enumerate(words)])
    # revisions are used only if they end: of a model that learned to
    rows, output = write_rows(folder / "ends.jsonl", [{"text": text} for text in words]), str(folder / "tuned")
    settings = {"batch_size": 8, "epochs": 6, "learning_rate": 1e-2, "save_every": 0, "template": "none"}
    with contextlib.redirect_stdout(io.StringIO()):
        list(SFT(SFTConfig(model=str(folder / "base"), data=rows, output=output, **settings)))


def arguments(command: str, rows: str, *more: str) -> list[str]:
    """What is typed, without the output folder."""
    return arguments_of(COMMANDS[command].format(rows=rows).split(), *more)


def arguments_of(words: list[str], *more: str) -> list[str]:
    """Words of a command, and more of them. The last of two options with one name counts."""
    given: dict[str, list[str]] = {}
    words = [*words, *more]
    first = next(n for n, text in enumerate(words) if text.startswith("--"))
    name = ""
    for text in words[first:]:
        if text.startswith("--"):
            name = text
            given[name] = []
        else:
            given[name].append(text)
    return [*words[:first], *(text for name, values in given.items() for text in (name, *values))]
