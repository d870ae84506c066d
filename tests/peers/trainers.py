"""TRL's trainers on a small model, plain and patched: python -m tests.peers.trainers [--steps 20] [--rounds 1] [--save]

SFT, DPO, GRPO and RLOO from one seed, each run in a process of its own; GRPO and RLOO on fixed completions. Prints,
for each trainer, the time of training, the memory it peaks at above what was there before, how many calls our ops
served, and how far the curves of loss and norm of the gradient are apart, relative for values above 1. RLOO's loss
is 0 by construction; the norms follow the weights. --lora trains adapters of PEFT. Exit status 1 if a curve differs by
more than 1e-4. With --save the figures are kept with those of the benchmarks.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from benchmarks.harness import Report, Timing

ROOT = Path(__file__).parents[2]
TRAINERS = ("SFT", "DPO", "GRPO", "RLOO")
NEAR = 1e-4


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        name, kind, steps, lora = sys.argv[2:]
        print(json.dumps(train(name, kind == "patched", int(steps), bool(int(lora)))))
        return 0
    more = {
        "--steps": {"type": int, "default": 20},
        "--rounds": {"type": int, "default": 1, "help": "times are medians over rounds, which alternate"},
        "--trainers": {"nargs": "+", "choices": TRAINERS, "default": TRAINERS},
        "--lora": {"action": "store_true"},
    }
    report = Report("trainers", more=more)
    options, apart = report.options, False
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    theirs = f"TRL {importlib.metadata.version('trl')}"
    for name in options.trainers:
        runs = {"patched": [], theirs: []}
        for _ in range(options.rounds):
            for kind, found in runs.items():
                found.append(in_process(name, kind, options.steps, options.lora))
        ours, plain = (found[0] for found in runs.values())
        figures = {
            "losses_apart": {"patched": farthest(plain["losses"], ours["losses"])},
            "norms_apart": {"patched": farthest(plain["grad_norms"], ours["grad_norms"])},
            "served": {"patched": sum(ours["calls"].values())},
            "peak_mib": {kind: statistics.median(run["mib"] for run in found) for kind, found in runs.items()},
            "last_loss": {kind: found[0]["losses"][-1] for kind, found in runs.items()},
        }
        apart |= not all(figures[curve]["patched"] <= NEAR for curve in ("losses_apart", "norms_apart"))
        model = "LoRA of a" if options.lora else "a"
        case = f"{name}, {options.steps} steps, {model} Llama of 2 layers"
        report.add(case, {kind: timing(found) for kind, found in runs.items()}, **figures)
    report.finish()
    return int(apart)


def timing(runs: list[dict]) -> Timing:
    times = sorted(1e3 * run["seconds"] for run in runs)
    return Timing(statistics.median(times), times[len(times) // 5], times[-1 - len(times) // 5], len(times))


def farthest(plain: list[float], patched: list[float]) -> float:
    """The largest difference, relative for values above 1."""
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(plain, patched, strict=True))


def in_process(name: str, kind: str, steps: int, lora: bool = False) -> dict:
    command = [sys.executable, "-m", "tests.peers.trainers", "--one", name, kind, str(steps), str(int(lora))]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/peers"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}, {kind}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def train(name: str, patched: bool, steps: int, lora: bool = False) -> dict:
    """Trains in this process; returns losses, seconds, memory and calls of our ops."""
    warnings.simplefilter("ignore")
    calls = patch_and_count() if patched else {}
    trainer = made(name, steps, lora)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of loading; it starts anew
    before = resident("VmRSS")
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    mib = resident("VmHWM") - before
    curves = {"losses": [e["loss"] for e in logged], "grad_norms": [float(e["grad_norm"]) for e in logged]}
    return {**curves, "seconds": seconds, "mib": mib, "calls": calls}


def resident(what: str) -> float:
    """MiB of this process in memory, now (VmRSS) or at most (VmHWM), on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{what}:"))) / 1024


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


def made(name: str, steps: int, lora: bool = False):
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
    if lora:
        import peft

        extra |= {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    elif name == "DPO":
        extra |= {"ref_model": models[1]}
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
