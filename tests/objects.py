"""Small runs of every trainer, from folders and files or from the objects in them."""

import json
from pathlib import Path

from loops import demonstrations, model_folder, pairs, write_rows
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastrlhf import DPO, KTO, PPO, SFT, DPOConfig, KTOConfig, PPOConfig, RewardConfig, RewardTrainer, SFTConfig
from fastrlhf.models.policy import RewardModel

COMMON = {"batch_size": 4, "device": "cpu", "learning_rate": 1e-3, "save_every": 0, "template": "none"}
TUNING = {**COMMON, "max_length": 64, "eval_fraction": 0.25}
LABELS = [{"prompt": "abcd"[n % 4] * 3, "completion": "xy"[n % 2] * 3, "label": n % 2 == 0} for n in range(8)]
PROMPTS = [{"prompt": f"Say {n}", "want": n % 3} for n in range(8)]
TRAINERS = {
    "sft": (SFT, SFTConfig, TUNING),
    "reward": (RewardTrainer, RewardConfig, {**TUNING, "center_data": "demonstrations"}),
    "dpo": (DPO, DPOConfig, {**TUNING, "reference": "other"}),
    "kto": (KTO, KTOConfig, {**TUNING, "lora_rank": 2}),
    "ppo": (PPO, PPOConfig, {**COMMON, "steps": 2, "max_new_tokens": 4, "reference": "other", "reward": "scores"}),
}
TRAINERS["ppo"][2].update(eval_reward="scores", eval_data="prompts", ptx_data="demonstrations", eval_every=1)
DATA = {"sft": "demonstrations", "reward": "pairs", "dpo": "pairs", "kto": "labels", "ppo": "prompts"}


def make_places(folder):
    """Makes the folders and files that options of TRAINERS name."""
    for name in ("model", "other"):
        model_folder(folder / name)
    RewardModel.from_pretrained(folder / "model", new_head=True).save_pretrained(folder / "scores")
    tiny_tokenizer().save_pretrained(folder / "scores")
    demonstrations(folder / "demonstrations", 8)
    pairs(folder / "pairs", 8)
    write_rows(folder / "labels", LABELS)
    write_rows(folder / "prompts", PROMPTS)
    for file in ("demonstrations", "pairs", "labels", "prompts"):
        (folder / file).rename(folder / f"{file}.jsonl")
    return folder


def as_paths(places, options):
    return {
        name: str(next(iter(places.glob(f"{value}*")))) if isinstance(value, str) and name in PLACED else value
        for name, value in options.items()
    }


PLACED = {"model", "data", "reference", "reward", "eval_reward", "eval_data", "ptx_data", "center_data"}


def as_objects(paths):
    """The options with what transformers and json read from their paths."""
    given = {"tokenizer": AutoTokenizer.from_pretrained(paths["model"])}
    for name in PLACED & {*paths}:
        path = paths[name]
        if path.endswith(".jsonl"):
            given[name] = [json.loads(line) for line in Path(path).read_text().splitlines()]
        else:
            kind = AutoModelForSequenceClassification if "reward" in name else AutoModelForCausalLM
            given[name] = kind.from_pretrained(path)
    return {**paths, **given}


def files_of(folder):
    """What a run computes; the folder of the base model is named in settings of adapters."""
    files = [folder / "metrics.jsonl", *(folder / "model").rglob("*.safetensors"), folder / "model/config.json"]
    return {path.relative_to(folder): path.read_bytes() for path in files}
