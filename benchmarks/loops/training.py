"""Training inside a side's process, timed: by one of our loops, by transformers' trainer, or by plain torch."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEARNING_RATE, ADAM_BETAS, ADAM_EPS, MAX_GRAD_NORM = 5e-4, (0.9, 0.95), 1e-5, 1.0


class Clock:
    """Wall seconds of a with-block, the work that a GPU still has to do included."""

    seconds = 0.0

    def __enter__(self) -> "Clock":
        self._wait()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self.start

    def _wait(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


def train_ours(trainer: Any) -> dict[str, Any]:
    """Does all steps of one of our loops, without the files that it writes between them.

    On a GPU the first step, which loads kernels, is not timed, and `share` says what part of the tokens is."""
    clock, losses, tokens = Clock(), [], []
    untimed = int(trainer.device.type != "cpu")

    def step() -> None:
        metrics = trainer.step()
        trainer.num_steps_done += 1
        losses.append(metrics["loss"])
        tokens.append(metrics["num_tokens"])

    for _ in range(untimed):
        step()
    with clock:
        for _ in range(trainer.num_steps - untimed):
            step()
    timed = sum(tokens[untimed:])
    return {"seconds": clock.seconds, "tokens": timed, "share": timed / sum(tokens), "losses": losses}


def train_theirs(trainer: Any) -> dict[str, Any]:
    """Runs transformers' trainer from the beginning of its training to the end of it."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        clock = Clock()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.clock.__enter__()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == 1 and not trainer.args.use_cpu:  # as with ours
                self.clock.__enter__()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.clock.__exit__()

    trainer.add_callback(Watch())
    trainer.train()
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    return {"seconds": Watch.clock.seconds, "losses": losses}


def right_padded(rows: list[list[int]], device: str) -> tuple[Any, Any]:
    """(N, longest) tokens and their mask, 1 where there is one."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def train_plainly(model: Any, batches: list[Any], loss_of: Callable[[Any], Any], device: str) -> dict[str, Any]:
    """A step of AdamW for each batch; on a GPU the first, which loads kernels, is not timed."""
    import torch

    adam = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=0.0, fused=True
    )
    clock, losses, untimed = Clock(), [], int(device != "cpu")

    def step(batch: Any) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())

    for batch in batches[:untimed]:
        step(batch)
    with clock:
        for batch in batches[untimed:]:
            step(batch)
    return {"seconds": clock.seconds, "losses": losses}


def trainer_options(options: argparse.Namespace, folder: Path, learning_rate: float = LEARNING_RATE) -> dict[str, Any]:
    """Settings of transformers' trainer that are those of ours below."""
    return {
        "output_dir": str(folder / "theirs"),
        "num_train_epochs": 1,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": ADAM_BETAS[0],
        "adam_beta2": ADAM_BETAS[1],
        "adam_epsilon": ADAM_EPS,
        "max_grad_norm": MAX_GRAD_NORM,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": options.device == "cpu",
        "bf16": options.device != "cpu",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }


def our_options(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Settings of our loops that are those of the trainer above."""
    return {
        "output": str(folder / "ours"),
        "overwrite": True,
        "learning_rate": LEARNING_RATE,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "adam_eps": ADAM_EPS,
        "max_grad_norm": MAX_GRAD_NORM,
        "save_every": 0,
        "template": "none",
        "device": options.device,
    }
