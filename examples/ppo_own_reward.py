"""PPO with a reward of your own: a Python function that takes texts and returns numbers.

    python examples/ppo_own_reward.py

The reward asks for answers of about twelve words. SmolLM2's answers are longer, and are cut off at first. The score in
the lines that the run prints rises towards 0 as they get shorter, and the KL says how far the policy has moved.

On a GPU nothing must change: device and dtype are chosen by themselves. What is small here
would be larger there: batch_size=128, max_new_tokens=256, steps=200, thousands of prompts.
"""

from tiny import MODEL, TINY

from fastrlhf import PPO, PPOConfig

THINGS = (
    "rain, wind, snow, the moon, a river, salt, bread, paper, glass, a bridge, music, a map, honey, wool, fire, a clock"
)
PROMPTS = [{"prompt": f"What is {thing}?"} for thing in THINGS.split(", ")]


def about_twelve_words(prompts, responses, *, finished, **columns):
    """0 for twelve words, less the further from it; an answer that was cut off loses 1."""
    pairs = zip(responses, finished, strict=True)
    return [-abs(len(response.split()) - 12) / 12 - (not ended) for response, ended in pairs]


config = PPOConfig(
    model=MODEL,
    data=PROMPTS,
    reward=about_twelve_words,
    output="runs/ppo_own_reward",
    overwrite=True,  # so that the example can be run again
    steps=2 if TINY else 20,
    batch_size=16,
    max_new_tokens=32,
    learning_rate=2e-5,
    value_learning_rate=2e-5,
)
ppo = PPO(config)
ppo.run()  # prints a line a step; `for metrics in ppo:` takes the steps one by one (early_stop.py)
for row in ppo.read_samples()[-4:]:
    print(f"{row['prompt']!r} -> {row['response']!r}: {row['score']:.2f}")
print("the model is in runs/ppo_own_reward/model")
