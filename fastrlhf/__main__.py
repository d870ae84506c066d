"""The command line: `fastrlhf COMMAND [--config FILE.yaml] [--option VALUE ...]`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

import fastrlhf
from fastrlhf import ranks
from fastrlhf.checkpoint import newest_checkpoint
from fastrlhf.config import DPOConfig, RewardConfig, SFTConfig, did_you_mean
from fastrlhf.options import help_text, parse
from fastrlhf.ppo_config import PPOConfig
from fastrlhf.run_config import RunConfig

COMMANDS: dict[str, type] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
    "dpo": DPOConfig,
    "run": RunConfig,
}
HELP = """fastrlhf COMMAND [--config FILE.yaml] [--option VALUE ...]

  sft       fine-tune a model on demonstrations
  reward    train a reward model on preference pairs
  ppo       train a model against a reward, with PPO
  dpo       train a model on preference pairs directly (DPO, IPO, SimPO, ORPO, ...)
  run       all of it: sft, pairs, reward model, ppo, evaluation, report; without options a demo
  info      versions, devices, and what serves each op
  check     every op against its float64 reference on this machine, with error, time and per cent of its limits

fastrlhf COMMAND --help lists the options of a command. fastrlhf --version prints the version."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 for a run that failed, 2 for bad usage, 130 when interrupted."""
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(HELP)
    elif command == "--version":
        print(fastrlhf.__version__)
    elif command == "info":
        from fastrlhf.info import info

        print(info())
    elif command == "check":
        return _check(rest)
    elif command not in COMMANDS:
        return _fail(
            "", f"unknown command {command!r}{did_you_mean(command, [*COMMANDS, 'info', 'check'])}\n\n{HELP}", 2
        )
    elif {"-h", "--help", "--help-all"} & set(rest):
        print(help_text(f"fastrlhf {command}", COMMANDS[command], everything="--help-all" in rest))
    else:
        return _train(command, rest)
    return 0


def _check(arguments: list[str]) -> int:
    from fastrlhf.check import HELP as help_of_check
    from fastrlhf.check import check

    if "-h" in arguments or "--help" in arguments:
        print(help_of_check)
        return 0
    try:
        lines = check(arguments)
    except ValueError as error:
        return _fail("check", f"{error}\nfastrlhf check --help lists the options", 2)
    status = 0
    for line in lines:
        print(line, flush=True)
        status |= "FAIL" in line
    return status


def _train(command: str, arguments: list[str]) -> int:
    try:
        config: Any = parse(COMMANDS[command], arguments)
    except (ValueError, TypeError) as error:
        return _fail(command, f"{error}\nfastrlhf {command} --help lists the options", 2)
    if command == "run" and ranks.start() > 1:
        return _fail(command, "one process does it all; give torchrun sft, reward and ppo, one after the other", 2)
    logging.disable_progress_bar()  # transformers' bar of loaded weights, for every one of four models
    try:
        for done in _loop(command)(config):
            if command == "run":
                print("{}: {}".format(*done), flush=True)
    except KeyboardInterrupt:
        return _fail(command, f"interrupted; {_how_to_go_on(command, config.output)}", 130)
    except Exception as error:
        if not _raised_by_us(error):
            raise
        return _fail(command, str(error), 1)
    ranks.say("\n".join(f"{what}: {path}" for what, path in _products(command, Path(config.output)).items()))
    ranks.stop()
    return 0


def _products(command: str, output: Path) -> dict[str, Path]:
    """What a command leaves, and where."""
    if command == "run":
        return {
            "checkpoint": output / "ppo/model",
            "reward model": output / "reward/model",
            "metrics": output / "ppo/metrics.jsonl",
            "evaluation": output / "evaluation/summary.json",
            "report": output / "report.html",
        }
    return {"model": output / "model", "metrics": output / "metrics.jsonl"}


def _how_to_go_on(command: str, output: str) -> str:
    if command == "run":
        return "--resume continues"
    newest = newest_checkpoint(output)
    return f"--resume continues from {newest}" if newest else "there is no checkpoint yet"


def _loop(command: str) -> Callable[[Any], Iterator[Any]]:
    # imported late: a wrong option is told in a second, not after every model class is loaded
    if command == "sft":
        from fastrlhf.sft import SFT

        return SFT
    if command == "reward":
        from fastrlhf.reward import RewardTrainer

        return RewardTrainer
    if command == "dpo":
        from fastrlhf.dpo import DPO

        return DPO
    if command == "run":
        from fastrlhf.pipeline import Run

        return Run
    from fastrlhf.ppo import PPO

    return PPO


def _raised_by_us(error: Exception) -> bool:
    """Whether a message was written for the user: an error raised by a raise statement of this package."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).is_relative_to(Path(fastrlhf.__file__).parent)
    return ours and (last.line or "").startswith("raise")


def _fail(command: str, text: str, status: int) -> int:
    print(f"fastrlhf {command}".strip() + f": error: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
