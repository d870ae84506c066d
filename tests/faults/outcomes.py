"""What a trial came to, and how that is judged from what a command said and left."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from processes import Process, differences, snapshot

# right: as an undisturbed run; told: but for what a warning names; refused: in one message, with nothing changed; read:
# hostile input was read or counted
GOOD = ("right", "told", "refused", "read")
# lost: work is gone, or the folder can neither be gone on with nor is there a reason; wrong: status 0, another result
BAD = ("lost", "wrong", "traceback", "unclear", "unescaped", "hung")


@dataclass(frozen=True)
class Outcome:
    """fault: what was done; ended: one of GOOD or BAD, or skipped; detail: what was seen; kills: processes killed"""

    fault: str
    ended: str
    detail: str = ""
    kills: int = 0


Trial = tuple[str, Callable[[Random], Outcome]]  # its name within the command, and what makes it
Trials = Iterator[Trial]


def spoken(process: Process) -> tuple[str, str]:
    """How a process that has ended spoke: read (status 0), refused (one message of ours), or what is bad about it."""
    said = process.said
    tail = said.strip()[-600:]
    if "Traceback" in said or "Fatal Python error" in said:
        return "traceback", tail
    if raw := re.findall(r"[^\n\t\r -~]", said):
        raw = [each for each in raw if unicodedata.category(each) in ("Cc", "Cf", "Zl", "Zp")]
        if raw:
            return "unescaped", f"{raw[:5]} in {tail!r}"
    if process.ended == 0:
        return "read", tail
    if process.ended not in (1, 2) or len(process.errors) != 1:
        return "unclear", f"status {process.ended}: {tail}"
    return "refused", process.errors[0]


def judged(process: Process, out: Path, expected: dict[str, str]) -> tuple[str, str]:
    """`spoken`, where a run that ends well must leave what is expected: right or wrong."""
    ended, detail = spoken(process)
    if ended != "read":
        return ended, detail
    words = differences(expected, snapshot(out))
    if not words:
        return "right", ""
    warned = [line for line in process.said.splitlines() if line.startswith("warning: ")]
    told = all(any(str(out / word.split()[0].split("/")[0]) in line for line in warned) for word in words)
    return "told" if told else "wrong", f"{'; '.join(words[:5])} after: {detail[-300:]}"
