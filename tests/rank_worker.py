"""The processes of tests/runtime/test_distributed.py: rank_worker.py RUNS.json of {"loop", "settings"}, "shards"."""

import copy
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import ARCHITECTURES, tiny_model

from fastrlhf import DPO, KTO, PPO, SFT, DPOConfig, PPOConfig, RewardConfig, RewardTrainer, SFTConfig
from fastrlhf.models.policy import Policy, load_causal_lm
from fastrlhf.packing import pack
from fastrlhf.runtime.fsdp import gathered, shard

LOOPS = {
    "sft": (SFT, SFTConfig),
    "reward": (RewardTrainer, RewardConfig),
    "dpo": (DPO, DPOConfig),
    "kto": (KTO, DPOConfig),
    "ppo": (PPO, PPOConfig),
}


def share_of_low_tokens(prompts, responses, *, response_ids, **_):
    """The share of token ids below 30."""
    return [sum(t < 30 for t in ids) / len(ids) for ids in response_ids]


def nan_in_the_second(prompts, responses, **_):
    """Scores of which those of the second process are no numbers."""
    return [float("nan") if dist.get_rank() == 1 else 0.0] * len(prompts)


def run(spec):
    """Runs a loop to its end; the second process kills itself after step `killed_after`.

    Returns PPO's samples, and the share of its parameters that this process holds; of a run that is `refused` why."""
    loop, config = LOOPS[spec["loop"]]
    try:
        trainer = loop(config(**spec["settings"]))
    except ValueError as error:
        if spec.get("refused"):
            return {"error": str(error)}
        raise
    sampled = []
    if spec["loop"] == "ppo":
        record(trainer, sampled, spec.get("limits"))
    for number, _ in enumerate(trainer, 1):
        if number == spec.get("killed_after") and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    parameters = list((trainer.policy if spec["loop"] == "ppo" else trainer.model).parameters())
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in parameters)
    return {"sampled": sampled, "held": held / sum(p.numel() for p in parameters)}


def gradient_errors():
    """For each architecture the largest error of gradients that two processes with shards get from a sequence each."""
    errors = {}
    for arch in ARCHITECTURES:
        whole = Policy(load_causal_lm(tiny_model(arch)))
        shards = Policy(load_causal_lm(copy.deepcopy(whole.model)))
        shard(shards)
        batch = pack([[5, 6, 7, 8, 9], [3, 4, 5]], prompt_lengths=[1, 1])
        whole(batch).sum().backward()
        shards(batch.select([dist.get_rank()])).sum().backward()
        pairs = zip(gathered([p.grad for p in shards.parameters()]), whole.parameters(), strict=True)
        errors[arch] = max(((ours - p.grad).abs().max() / p.grad.abs().max()).item() for ours, p in pairs)
    return errors


def record(trainer, sampled, limits):
    """Notes the samples of all processes; `limits`: most new tokens of the prompts of a step, in turn."""
    engine_generate, generate, size = trainer.rollout.engine.generate, trainer.generate, trainer.config.batch_size

    def limited(prompts, sampling, *, seeds, **options):
        most = [limits[seed % size] for seed in seeds]
        return engine_generate(prompts, sampling, seeds=seeds, limits=most, **options)

    def recorded(*args, **options):
        samples = generate(*args, **options)
        sampled.append([sample.response for sample in samples])
        return samples

    trainer.generate = recorded
    if limits:
        trainer.rollout.engine.generate = limited


if __name__ == "__main__":
    torch.set_num_threads(1)
    specs = Path(sys.argv[1])
    torch.manual_seed(0)
    found = [gradient_errors() if spec == "shards" else run(spec) for spec in json.loads(specs.read_text())]
    if dist.get_rank() == 0:
        specs.with_suffix(".found").write_text(json.dumps(found))
    dist.destroy_process_group()
