"""What the trials of a command came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass
class Tally:
    """refused: trials in which a process was refused in one line; old, new: which run went on after a kill; faults:
    what was wrong or lost"""

    what: str
    command: str
    trials: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    NAMES: ClassVar = ("refused", "old", "new", "wrong", "lost")
    HEAD: ClassVar = (
        f"{'':<8}{'command':<12}{'trials':>8}" + "".join(f"{name:>9}" for name in NAMES) + f"{'seconds':>9}"
    )

    def fault(self, kind: str, text: str) -> None:
        """kind: wrong or lost"""
        self.counts[kind] += 1
        self.faults.append(f"{kind}: {text}")

    def __str__(self) -> str:
        numbers = "".join(f"{self.counts[name]:>9}" for name in self.NAMES)
        line = f"{self.what:<8}{self.command:<12}{self.trials:>8}{numbers}{self.seconds:>9.0f}"
        return "\n".join([line, *(f"    {fault}" for fault in self.faults)])
