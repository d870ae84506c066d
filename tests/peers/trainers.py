"""TRL's trainers on a small model, plain and patched: python -m tests.peers.trainers [--steps 20] [--rounds 1]

SFT, DPO, GRPO and RLOO from one seed, each run in a process of its own; GRPO and RLOO on fixed completions. Prints,
for each trainer, how far the loss curves are apart, the time of training, the memory it peaks at above what was there
before, and how many calls our ops served. RLOO's loss is 0 by construction, so the norms of the gradients, which
follow the weights, are compared too. Exit status 1 if a curve differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAINERS = ("SFT", "DPO", "GRPO", "RLOO")
NEAR = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1, help="times are medians over rounds, which alternate")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train(options.one[0], options.one[1] == "patched", options.steps)))
        return 0
    apart = False
    for name in options.trainers:
        runs = {kind: [] for kind in ("plain", "patched")}
        for _ in range(options.rounds):
            for kind, found in runs.items():
                found.append(in_process(name, kind, options.steps))
        plain, patched = (found[0]["losses"] for found in runs.values())
        worst = farthest(plain, patched)
        norms = farthest(*(found[0]["grad_norms"] for found in runs.values()))
        apart |= not (worst <= NEAR and norms <= NEAR)
        calls = runs["patched"][0]["calls"]
        print(f"{name:<5} {len(plain)} losses, first {plain[0]:.4f}, last {plain[-1]:.4f}, at most {worst:.1e} apart")
        print(f"      norms of the gradients at most {norms:.1e} apart")
        for kind, found in runs.items():
            seconds, mib = (statistics.median(run[key] for run in found) for key in ("seconds", "mib"))
            print(f"      {kind:<8} {seconds:6.1f} s  {mib:7.0f} MiB")
        print(f"      our ops  {', '.join(f'{op} {n}' for op, n in calls.items() if n) or 'none called'}", flush=True)
    return int(apart)


def farthest(plain: list[float], patched: list[float]) -> float:
    """The largest difference, relative for values above 1."""
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(plain, patched, strict=True))


def in_process(name: str, kind: str, steps: int) -> dict:
    command = [sys.executable, "-m", "tests.peers.trainers", "--one", name, kind, "--steps", str(steps)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/peers"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}, {kind}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def train(name: str, patched: bool, steps: int) -> dict:
    """Trains in this process; returns losses, seconds, memory and calls of our ops."""
    warnings.simplefilter("ignore")
    calls = patch_and_count() if patched else {}
    trainer = made(name, steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    curves = {"losses": [e["loss"] for e in logged], "grad_norms": [float(e["grad_norm"]) for e in logged]}
    return {**curves, "seconds": seconds, "mib": mib, "calls": calls}


def patch_and_count() -> dict[str, int]:
    import fastrlhf
    from fastrlhf.integrations import _rows, trl

    calls = {}

    def count(module, op):
        original = getattr(module, op)

        def counted(*args, **kwargs):
            calls[op] += 1
            return original(*args, **kwargs)

        setattr(module, op, counted)

    done = fastrlhf.patch("trl")
    print(done, file=sys.stderr)
    for module, op in ((_rows, "token_logprobs"), (trl, "linear_token_logprobs")):
        calls[op] = 0  # without those of the self-tests
        count(module, op)
    return calls


def made(name: str, steps: int):
    """The trainer, on a Llama with a vocabulary of 32000 and on made-up text."""
    import peer_hub
    import torch
    import trl
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    random.seed(0)
    torch.manual_seed(0)
    tokens = peer_hub.tokenizer()
    ids = {"pad_token_id": tokens.pad_token_id, "eos_token_id": tokens.eos_token_id, "bos_token_id": 1}
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tempfile.mkdtemp()  # GRPO and RLOO load their reference from where the policy came from
    LlamaForCausalLM(LlamaConfig(vocab_size=32000, **size, **ids)).save_pretrained(folder)
    models = [LlamaForCausalLM.from_pretrained(folder) for _ in range(2)]

    def said(parts):
        return "".join(random.choices(parts, k=random.randint(4, 16)))

    rows = []
    for _ in range(64):
        texts = (said(peer_hub.QUESTIONS), said(peer_hub.ANSWERS), said(peer_hub.WORSE))
        rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    keep = {"SFT": {"prompt": "prompt", "chosen": "completion"}, "DPO": {k: k for k in rows[0]}}
    names = keep.get(name, {"prompt": "prompt"})
    data = Dataset.from_list([{new: row[old] for old, new in names.items()} for row in rows])
    options = {"output_dir": tempfile.mkdtemp(), "max_steps": steps, "logging_steps": 1, "report_to": [], "seed": 0}
    options |= {"per_device_train_batch_size": 8, "use_cpu": True, "bf16": False, "learning_rate": 1e-3}
    options |= {"save_strategy": "no", "disable_tqdm": True}
    if name in ("GRPO", "RLOO"):
        options |= {"num_generations": 4, "max_completion_length": 64, "beta": 0.04}
        models[0].generate = completions_of(tokens)
    extra = {"reward_funcs": share_of_e} if name in ("GRPO", "RLOO") else {}
    extra |= {"ref_model": models[1]} if name == "DPO" else {}
    config, trainer = getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
    return trainer(models[0], args=config(**options), train_dataset=data, processing_class=tokens, **extra)


def share_of_e(completions, **_):
    return [text.count("e") / (1 + len(text)) for text in completions]


def completions_of(tokens):
    """A stand-in for generate: random completions that depend on nothing but how often it was called."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def generate(input_ids, **_):
        drawn = torch.randint(5, len(tokens), (input_ids.shape[0], 64), generator=generator)
        for row, length in enumerate(torch.randint(8, 64, (input_ids.shape[0],), generator=generator).tolist()):
            drawn[row, length:] = tokens.eos_token_id
        return torch.cat([input_ids, drawn.to(input_ids)], 1)

    return generate


if __name__ == "__main__":
    sys.exit(main())
