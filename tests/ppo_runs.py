"""A small PPO run: its folder, its settings, and a reward."""

from loops import model_folder, write_rows
from tiny import tiny_tokenizer

from fastrlhf import PPOConfig
from fastrlhf.models.policy import RewardModel

VOCAB = 300


def make_folder(path):
    """A folder with a random 2-layer model, its tokenizer, a reward model and a prompt file."""
    model_folder(path / "model")
    RewardModel.from_pretrained(path / "model", new_head=True).save_pretrained(path / "reward")
    tiny_tokenizer(VOCAB).save_pretrained(path / "reward")
    write_rows(path / "prompts.jsonl", [{"prompt": f"Say {n}", "want": n % 3} for n in range(40)])
    return path


def settings(folder, **changes):
    return {
        "model": str(folder / "model"),
        "data": str(folder / "prompts.jsonl"),
        "output": str(folder / "out"),
        "reward": share_of_low_tokens,
        "steps": 3,
        "batch_size": 8,
        "minibatches": 2,
        "epochs": 2,
        "max_new_tokens": 8,
        "learning_rate": 1e-3,
        "value_learning_rate": 1e-3,
        **changes,
    }


def config(folder, **changes):
    return PPOConfig(**settings(folder, **changes))


def share_of_low_tokens(prompts, responses, *, response_ids, **_):
    """The share of token ids below 30: about 30 / 300 for a random model, 1 at best."""
    return [sum(t < 30 for t in ids) / len(ids) for ids in response_ids]
