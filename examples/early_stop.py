"""A loop with an early stop: you take the steps, look at the metrics, and end the run when you have seen enough.

    python examples/early_stop.py

PPO runs until its policy is more than 3 nats a response from the reference, or scores well enough. What it has then is
saved, and the run can still go on: a second loop continues from the checkpoint with resume=True.

On a GPU nothing must change; larger batch_size, max_new_tokens and limits fit there.
"""

from dataclasses import replace

from tiny import MODEL, TINY

from fastrlhf import PPO, PPOConfig

PROMPTS = [{"prompt": f"Say something about the number {number}."} for number in range(32)]


def brevity(prompts, responses, **columns):
    """The fewer characters, the better."""
    return [-len(response) / 100 for response in responses]


config = PPOConfig(
    model=MODEL,
    data=PROMPTS,
    reward=brevity,
    output="runs/early_stop",
    overwrite=True,  # so that the example can be run again
    steps=4 if TINY else 40,
    batch_size=8 if TINY else 16,
    max_new_tokens=24,
    learning_rate=2e-5,
    value_warmup_steps=0,
)
with PPO(config) as ppo:  # leaving the block unlocks the output folder
    for metrics in ppo:
        score, kl = metrics["objective/scores"], metrics["objective/kl"]
        if kl > 3 or score > -0.2 or (TINY and ppo.num_steps_done == 2):
            ppo.save_checkpoint()  # from which resume=True goes on
            ppo.save("runs/early_stop_model")  # the model as it is now, which transformers loads
            print(f"stopped after {ppo.num_steps_done} of {ppo.num_steps} steps; runs/early_stop_model has the model")
            break

with PPO(replace(config, overwrite=False, resume=True)) as ppo:
    if ppo.num_steps_done < ppo.num_steps:
        print(f"one step more: score {next(ppo)['objective/scores']:.2f}; {ppo.num_steps_done} steps are done")
