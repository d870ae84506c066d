"""The command line: `fastrlhf COMMAND [--config FILE.yaml] [--option VALUE ...]`."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers.utils import logging

import fastrlhf
from fastrlhf.cli.commands import COMMANDS, LOOP_PRODUCTS
from fastrlhf.cli.options import help_text, parse
from fastrlhf.errors import ReportedError
from fastrlhf.rewards.time_limit import leave_if_interrupted
from fastrlhf.runtime import distributed, signals
from fastrlhf.runtime.resume_hint import resume_hint
from fastrlhf.runtime.terminal import closed_pipes, mute, plain_warnings, print_error, printable
from fastrlhf.settings.option import did_you_mean

HELPS = {name: command.help for name, command in COMMANDS.items()}
HELP = """fastrlhf COMMAND [--config FILE.yaml] [--option VALUE ...]

{}

fastrlhf COMMAND --help lists the options of a command. fastrlhf --version prints the version.""".format(
    "\n".join(f"  {name:<{2 + max(map(len, HELPS))}}{text}" for name, text in HELPS.items())
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 for a run that failed, 2 for bad usage, 130 or 143 when
    SIGINT or SIGTERM stopped it."""
    if arguments is None:
        sys.excepthook = print_error
    try:
        try:
            status = _main(arguments)
        except KeyboardInterrupt:  # before or after the work, of which `_run` says more
            print("fastrlhf: interrupted", file=sys.stderr)
            return 130
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # here, where an error can be met
    except BrokenPipeError:
        if not closed_pipes():
            raise
        mute(closed_pipes())  # whoever reads what is printed has enough, as `| head`
        return 1
    if arguments is None:  # elsewhere main is one call of many, which must not end the process
        leave_if_interrupted(status)
    return status


def _main(arguments: Sequence[str] | None) -> int:
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if rest and f"{command} {rest[0]}" in COMMANDS:  # a command of two words
        command = f"{command} {rest.pop(0)}"
    if command in ("-h", "--help", "help"):
        print(HELP)
    elif command == "--version":
        print(fastrlhf.__version__)
    elif family := [name for name in COMMANDS if name.startswith(f"{command} ")]:
        return _fail(command, f"which of {', '.join(family)}? Each has its --help", 2)
    elif command not in COMMANDS:
        return _fail("", f"unknown command {command!r}{did_you_mean(command, list(HELPS))}\n\n{HELP}", 2)
    elif {"-h", "--help", "--help-all"} & set(rest):
        print(help_text(f"fastrlhf {command}", COMMANDS[command].config, everything="--help-all" in rest))
    else:
        return _run(command, rest)
    return 0


def _run(command: str, arguments: list[str]) -> int:
    try:
        config: Any = parse(COMMANDS[command].config, arguments)
    except (ValueError, TypeError) as error:
        return _fail(command, f"{error}\nfastrlhf {command} --help lists the options", 2)
    if COMMANDS[command].products is not LOOP_PRODUCTS and distributed.start() > 1:
        return _fail(command, "one process does it all; give torchrun sft, reward and ppo, one after the other", 2)
    logging.disable_progress_bar()  # transformers' bar of loaded weights, for every one of four models
    before = _settings_stamp(config)
    try:
        with plain_warnings(), signals.handled():
            try:
                best = _do(command, config)
            except KeyboardInterrupt as error:  # told in here, where a further signal ends the process without a word
                number = error.number if isinstance(error, signals.Interrupted) else signal.SIGINT
                if distributed.is_main_process():
                    is_new = hasattr(config, "resume") and _settings_stamp(config) == before
                    left = "nothing had been written yet; give the same command again" if is_new else ""
                    text = f"fastrlhf {command}: interrupted; {left or resume_hint(command, config)}"
                    print(printable(text), file=sys.stderr)
                return 128 + number
    except Exception as error:
        if isinstance(error, BrokenPipeError) and closed_pipes():
            raise
        left = "" if _settings_stamp(config) == before else resume_hint(command, config)
        if not (isinstance(error, ReportedError) or _of_a_file(error)):
            if left:
                error.add_note(left)
            raise
        return _fail(command, "\n".join(filter(None, (str(error), left))), 1)
    for what, name in COMMANDS[command].products.items():
        path = Path(config.output) / name
        is_empty = path.is_file() and path.stat().st_size == 0
        distributed.print_once(f"{what}: none, {path} is empty" if is_empty else f"{what}: {path}")
    if best and (Path(config.output) / "best").exists():
        of = "of the start" if best["step"] == 0 else f"after step {best['step']}"
        distributed.print_once(f"best: {Path(config.output) / 'best'} ({of}, held-out score {best['score']:.4g})")
    distributed.stop()
    return 0


def _do(command: str, config: Any) -> Any:
    """Does a command; prints what it yields. Returns step and score of the best model of a loop that keeps one."""
    made = _made(COMMANDS[command].source)(config)
    with ExitStack() as stack:
        if hasattr(made, "close"):
            stack.callback(made.close)
        for done in made:
            if isinstance(done, str):
                print(printable(done), flush=True)
            elif isinstance(done, tuple):  # a stage and what came out of it
                print(printable("{}: {}".format(*done)), flush=True)
    return getattr(made, "best", None)


def _settings_stamp(config: Any) -> int | None:
    """When a command last made its output folder ready, by which it is known whether this one did."""
    settings = Path(getattr(config, "output", "")) / "config.yaml"
    return settings.stat().st_mtime_ns if settings.is_file() else None


def _made(source: str) -> Callable[[Any], Iterable[Any]]:
    # imported late: a wrong option is told in a second, not after every model class is loaded
    module, _, name = source.partition(":")
    made: Callable[[Any], Iterable[Any]] = getattr(importlib.import_module(f"fastrlhf.{module}"), name)
    return made


def _of_a_file(error: Exception) -> bool:
    """Whether the system refused a file or folder, and says which: it cannot be made, or the disk is full."""
    return isinstance(error, OSError) and error.filename is not None


def _fail(command: str, text: str, status: int) -> int:
    print(printable(f"fastrlhf {command}".strip() + f": error: {text}"), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
