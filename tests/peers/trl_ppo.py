"""TRL 1.12's PPOTrainer on responses that are given: run in an environment of its own, without anything of ours.

    python trl_ppo.py FOLDER   # models and task.json in it; writes theirs.pt

The trainer runs as it is, but for three things: generation returns the given responses with the model's logits; an
optimizer step notes the gradients and gives the weights of the later_ models; both read the trainer's local variables.
"""

import json
import sys
from pathlib import Path

import torch
import trl.experimental.ppo.ppo_trainer as module
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

TOKENS = ("logprobs", "ref_logprobs", "values", "rewards", "returns", "advantages")
CAUSAL, SCALAR = AutoModelForCausalLM, AutoModelForSequenceClassification


def main(folder: Path) -> None:
    task = json.loads((folder / "task.json").read_text())
    rows, settings = task["rows"], task["settings"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    trainer = PPOTrainer(
        args=PPOConfig(
            **settings,
            output_dir=str(folder / "theirs"),
            per_device_train_batch_size=len(rows),
            num_mini_batches=1,
            total_episodes=len(rows),
            response_length=len(rows[0][1]),
            local_rollout_forward_batch_size=len(rows),
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        processing_class=tokenizer,
        model=load(CAUSAL, folder / "model"),
        ref_model=load(CAUSAL, folder / "reference"),
        reward_model=load(SCALAR, folder / "reward"),
        value_model=load(SCALAR, folder / "reward"),
        train_dataset=Dataset.from_list([{"input_ids": prompt} for prompt, _ in rows]),
    )
    responses = {tuple(prompt): response for prompt, response in rows}
    found = {"policy": [], "value": [], "policy_loss": [], "value_loss": []}

    def generate(model, queries, size, pad, config):
        given = torch.tensor([responses[tuple(query)] for query in queries.tolist()])
        both = torch.cat([queries, given], dim=1)
        logits = module.forward(model, both, pad).logits[:, queries.shape[1] - 1 : -1]
        return both, logits / config.temperature

    def step(*_, **__):
        local = sys._getframe(1).f_locals
        if not found["policy"]:
            order = [rows.index([query, responses[tuple(query)]]) for query in local["queries"].tolist()]
            back = torch.tensor(order).argsort()
            found.update({name: local[name][back].clone() for name in TOKENS})
        for name, model, loader in (
            ("policy", trainer.model.policy, CAUSAL),
            ("value", trainer.model.value_model, SCALAR),
        ):
            found[name].append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
            later = "later_model" if name == "policy" else "later_reward"
            model.load_state_dict(load(loader, folder / later).state_dict())
        found["policy_loss"].append(local["pg_loss"].item())
        found["value_loss"].append(local["vf_loss"].item())

    module.batch_generation, trainer.optimizer.step = generate, step
    trainer.train()
    torch.save(found, folder / "theirs.pt")


def load(loader, path):
    return loader.from_pretrained(path, dtype=torch.float32)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
