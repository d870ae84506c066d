"""`patch` in TRL: its GRPOTrainer on our ops, with one line more than without.

    pip install trl
    python examples/patch_trl.py

`fastrlhf.patch("trl")` replaces TRL's functions for log-probabilities and entropies, each only after it has given the
same values and gradients as the original on small inputs. `print` shows what was replaced and what was left alone.

On a GPU leave out use_cpu; the patch checks each op there too, and nothing else changes.
"""

import importlib.util
import sys

if importlib.util.find_spec("trl") is None:
    sys.exit(print("skipped: TRL is not installed (pip install trl)"))

from datasets import Dataset
from tiny import MODEL, TINY
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import fastrlhf

print(fastrlhf.patch("trl"))  # before the trainer is built


def brevity(completions, **columns):
    """TRL's form of a reward function. The fewer characters, the better."""
    return [-len(completion[0]["content"]) / 100 for completion in completions]


questions = ["What is rain?", "What is a bridge?", "What is salt?", "What is the moon?"] * 4
config = GRPOConfig(
    output_dir="runs/patch_trl",
    use_cpu=True,
    bf16=False,
    max_steps=2 if TINY else 5,
    per_device_train_batch_size=8,
    num_generations=8,
    max_completion_length=8 if TINY else 24,
    learning_rate=1e-5,
    logging_steps=1,
    report_to="none",
    save_strategy="no",
)
trainer = GRPOTrainer(
    model=MODEL,
    processing_class=AutoTokenizer.from_pretrained(MODEL),
    reward_funcs=brevity,
    args=config,
    train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in questions]),
)
trainer.train()
