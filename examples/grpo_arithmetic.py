"""GRPO with a verifier: word problems like GSM8K's, where the number after #### is right or wrong.

    python examples/grpo_arithmetic.py

There is no reward model and no value model: each problem is answered several times, a right answer is worth 1, and an
answer's advantage is how much better it is than the others to the same problem. A little SFT comes first, since
SmolLM2 would never write ####, and where all answers are wrong there is nothing to learn from.

On a GPU nothing must change; take GSM8K (`fastrlhf data convert ... --format gsm8k`),
samples_per_prompt=16, batch_size=256, max_new_tokens=512, and a model of more than a billion parameters.
"""

import random
import re

from tiny import MODEL, TINY

from fastrlhf import PPO, SFT, PPOConfig, SFTConfig


def problem(rng):
    name, thing = rng.choice(["Tom", "Ana", "Li", "Omar"]), rng.choice(["apples", "books", "coins", "pens"])
    has, gets = rng.randint(2, 9), rng.randint(2, 9)
    return {
        "prompt": f"{name} has {has} {thing} and buys {gets} more. How many {thing} does {name} have?",
        "completion": f"{name} has {has} + {gets} = {has + gets} {thing}.\n#### {has + gets}",
        "answer": str(has + gets),
    }


def verify(prompts, responses, *, answer, **columns):
    """1 where the number after #### is the answer, else 0. `answer` is the column of the data."""
    found = [re.search(r"####\s*(-?\d+)", response) for response in responses]
    return [float(bool(number) and number[1] == right) for number, right in zip(found, answer, strict=True)]


rng = random.Random(0)
shown = [problem(rng) for _ in range(16 if TINY else 64)]
asked = [{"prompt": row["prompt"], "answer": row["answer"]} for row in (problem(rng) for _ in range(100))]

SFT(SFTConfig(model=MODEL, data=shown, output="runs/grpo/sft", batch_size=8, learning_rate=5e-5, overwrite=True)).run()
config = PPOConfig(
    model="runs/grpo/sft/model",
    data=asked,
    reward=verify,
    output="runs/grpo/ppo",
    overwrite=True,  # so that the example can be run again
    estimator="grpo",
    samples_per_prompt=4 if TINY else 8,
    batch_size=8 if TINY else 32,  # counts responses: 4 problems with 8 answers each
    steps=2 if TINY else 20,
    max_new_tokens=32,
    learning_rate=1e-5,
)
grpo = PPO(config)
grpo.run()  # `score` in its lines is the share of right answers
for row in grpo.read_samples()[-4:]:
    print(f"{row['prompt']!r} -> {row['response']!r}: {row['score']:.0f}")
