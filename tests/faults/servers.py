"""Servers that answer what they should not, at the start or half-way: refused in a message, and gone on with later."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from commands import JUDGE, PPO, arguments_of
from hostile_server import FAULTS, HostileServer, answer
from outcomes import Outcome, Trials, judged, spoken
from processes import Process, snapshot, start
from undisturbed import restored

COMMANDS = {
    "label": f"label {JUDGE} --policy base --data new/prompts.jsonl --judge {{url}} --judge-model m --judge-timeout 3",
    "ppo": f"{PPO.format(rows='new')} --reward fault_rewards:low --rollout-url {{url}} --weight-sync stale "
    "--rollout-timeout 3",
}
STEER = "\x1b[31m\u202e"
GOOD_FIRST = 20  # requests that are answered well before the first that is not, of those that come half-way


def _choices(change: Callable[[dict[str, Any]], object]) -> Callable[[Any], Any]:
    """A change of the only choice of an answer."""

    def changed(good: Any) -> Any:
        odd = copy.deepcopy(good)
        change(odd["choices"][0])
        return odd

    return changed


def _tokens(values: list[Any]) -> Callable[[Any], Any]:
    return _choices(lambda choice: choice.update(token_ids=[*values, *choice["token_ids"][len(values) :]]))


def _logprobs(value: Any) -> Callable[[Any], Any]:
    def change(choice: dict[str, Any]) -> None:
        if "content" in choice["logprobs"]:
            choice["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = value
        else:
            choice["logprobs"]["token_logprobs"][0] = value

    return _choices(change)


ODD: dict[str, Callable[[Any], Any]] = {  # well-formed answers with odd contents
    **{f"a log-probability of {value!r}": _logprobs(value) for value in (math.nan, 5.0, "-1", True, 10**400, [])},
    "no log-probabilities": _choices(lambda choice: choice.update(logprobs=None)),
    "no choices": lambda good: {**good, "choices": []},
    "choices that are null": lambda good: {**good, "choices": None},
    "an error with status 200": lambda good: {"error": {"message": "\x1b[31moverloaded\u202e"}},
}
OF_ROLLOUT: dict[str, Callable[[Any], Any]] = {
    **{f"a token {value!r}": _tokens([value]) for value in (10**9, -1, 1.5, "abc", True, None, 10**400)},
    "more tokens than asked": _tokens([5] * 99),
    "no tokens": _choices(lambda choice: choice.update(token_ids=[])),
    "another prompt": _choices(lambda choice: choice.update(prompt_token_ids=[1, 2])),
    "an odd finish_reason": _choices(lambda choice: choice.update(finish_reason=STEER)),
}
OF_JUDGE: dict[str, Callable[[Any], Any]] = {
    "no answers": _choices(lambda choice: choice["logprobs"]["content"][0].update(top_logprobs=[])),
    "the same answer 30 times": _choices(
        lambda choice: choice["logprobs"]["content"][0]["top_logprobs"].extend([{"token": "A", "logprob": -0.1}] * 30)
    ),
    "a token that is a number": _choices(
        lambda choice: choice["logprobs"]["content"][0]["top_logprobs"][0].update(token=1)
    ),
}


def trials(command: str, folder: Path, number: int) -> Trials:
    """number: of no meaning: each fault comes at the start and half-way"""
    expected = _undisturbed(command, folder)
    for fault in FAULTS:
        for moment in ("at the start", "half-way"):
            yield f"{fault} {moment}", partial(_try, command, folder, expected, fault, moment)
    for fault in {**ODD, **(OF_ROLLOUT if command == "ppo" else OF_JUDGE)}:
        yield fault, partial(_try, command, folder, expected, fault, "half-way")


class Server:
    """A process that answers well, or with a fault after so many requests, until it is told to answer well."""

    def __init__(self, fault: str | None, good: float) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                turn = Turn(fault, good)
                signal.signal(signal.SIGUSR1, lambda *_: setattr(turn, "good", math.inf))
                os.write(writer, HostileServer(turn).url.encode())
                while True:
                    time.sleep(3600)
            finally:
                os._exit(1)
        self.url = os.read(reader, 100).decode()
        os.close(reader)
        os.close(writer)

    def mend(self) -> None:
        os.kill(self.pid, signal.SIGUSR1)

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Turn:
    """What HostileServer does with a request."""

    reads_requests = True

    def __init__(self, fault: str | None, good: float) -> None:
        self.fault, self.good = fault, good

    def __call__(self, head: str, body: str) -> Any:
        good = _good(head, body)
        self.good -= 1
        if self.fault is None or self.good >= 0:
            return answer(good)
        if self.fault in FAULTS:
            return FAULTS[self.fault]
        if head.startswith("GET"):
            return answer(good)
        return answer({**ODD, **OF_ROLLOUT, **OF_JUDGE}[self.fault](good))


def _good(head: str, body: str) -> Any:
    """What a server should say: it follows from what it is asked. The policy, untrained, holds 300 tokens as likely."""
    if head.startswith("GET"):
        return {"object": "list", "data": [{"id": name, "max_model_len": 4096} for name in ("m", "policy")]}
    asked = json.loads(body)
    drawn = Random(zlib.crc32(json.dumps(asked, sort_keys=True).encode()))
    if "messages" in asked:
        first = -drawn.random()
        second = math.log(1 - math.exp(first)) if first < -1e-6 else -20.0
        listed = [{"token": "A", "logprob": first}, {"token": "B", "logprob": second - 0.01}]
        return {"choices": [{"logprobs": {"content": [{"token": "A", "top_logprobs": listed}]}}]}
    tokens = [drawn.randint(100, 250) for _ in range(asked["max_tokens"])]
    told = {"token_logprobs": [-math.log(300)] * len(tokens), "tokens": ["x"] * len(tokens)}
    choice = {"index": 0, "text": "x" * len(tokens), "logprobs": told, "stop_reason": None, "token_ids": tokens}
    return {"choices": [{**choice, "prompt_token_ids": asked["prompt"], "finish_reason": "length"}]}


def _start(command: str, url: str, folder: Path, *more: str) -> Process:
    words = arguments_of(COMMANDS[command].format(url=url).split(), *more)
    return start(words, folder / "out", folder / "a.log")


def _undisturbed(command: str, folder: Path) -> dict[str, str]:
    server = Server(None, 0)
    process = _start(command, server.url, folder)
    process.wait()
    server.close()
    if process.ended != 0:
        raise RuntimeError(f"{command} with a good server fails: {process.said[-2000:]}")
    return snapshot(folder / "out")


def _try(command: str, folder: Path, expected: dict[str, str], fault: str, moment: str, rng: Random) -> Outcome:
    restored(None, folder / "out")
    server = Server(fault, 0 if moment == "at the start" else GOOD_FIRST)
    try:
        process = _start(command, server.url, folder)
        process.wait()
        ended, detail = spoken(process)
        if ended == "read":
            detail, ended = f"it was taken: {detail}", "wrong"
        if ended == "refused":
            server.mend()
            process = _start(command, server.url, folder, "--resume")
            process.wait()
            later, said = judged(process, folder / "out", expected)
            if later != "right":
                ended, detail = later if later != "refused" else "lost", f"{detail}; later: {said}"
    finally:
        server.close()
    return Outcome(f"a server: {fault}", ended, detail)
