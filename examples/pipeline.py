"""The pipeline in Python: demonstrations -> SFT, pairs -> reward model, prompts -> PPO, and what changed.

    python examples/pipeline.py

The task is made up: questions about capitals are to be answered with a whole sentence. SFT sees such answers, the
reward model learns from pairs that a sentence is better than one word, and PPO is paid by that reward model alone. The
reward model's score on held-out questions is printed at the start and at the end.

On a GPU nothing must change; batch_size, max_new_tokens and steps would be larger, and files
stand in place of the lists (docs/data.md). `fastrlhf run` does all of it in one command, with a report.
"""

from tiny import MODEL, TINY

from fastrlhf import PPO, SFT, PPOConfig, RewardConfig, RewardTrainer, SFTConfig

CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Peru Lima, Kenya Nairobi, "
    "Cuba Havana, Norway Oslo, Greece Athens, Ireland Dublin, China Beijing, Poland Warsaw, Austria Vienna, "
    "Iran Tehran, Chile Santiago"
)
COUNTRIES = [pair.split() for pair in CAPITALS.split(", ")]
PROMPTS = [f"What is the capital of {country}?" for country, _ in COUNTRIES]
SENTENCES = [f"The capital of {country} is {city}." for country, city in COUNTRIES]

demonstrations = [{"prompt": p, "completion": s} for p, s in zip(PROMPTS, SENTENCES, strict=True)]
pairs = [
    {"prompt": prompt, "chosen": sentence, "rejected": city}
    for prompt, sentence, (_, city) in zip(PROMPTS, SENTENCES, COUNTRIES, strict=True)
]
common = {"batch_size": 8, "learning_rate": 2e-5, "overwrite": True}  # overwrite: the example can be run again

SFT(SFTConfig(model=MODEL, data=demonstrations[:12], output="runs/pipeline/sft", epochs=2, **common)).run()

reward = RewardConfig(
    model="runs/pipeline/sft/model", data=pairs[:12], output="runs/pipeline/reward", epochs=4, **common
)
RewardTrainer(reward).run()

config = PPOConfig(
    model="runs/pipeline/sft/model",
    reward="runs/pipeline/reward/model",
    data=[{"prompt": prompt} for prompt in PROMPTS[:12]],
    eval_data=[{"prompt": prompt} for prompt in PROMPTS[12:]],
    output="runs/pipeline/ppo",
    steps=2 if TINY else 10,
    max_new_tokens=24,
    **common,
)
ppo = PPO(config)
before = ppo.evaluate()["eval/score"]
ppo.run()
print(f"score on held-out questions: {before:.2f} before PPO, {ppo.evaluate()['eval/score']:.2f} after")
