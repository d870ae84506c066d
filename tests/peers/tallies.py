"""The tallies of a trainer's own tests, as text and as Markdown."""

from __future__ import annotations

import collections
import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

NAMES = {"trl": "TRL", "verl": "verl", "openrlhf": "OpenRLHF"}
VERSION_FILES = {"trl": "VERSION", "verl": "verl/version/version", "openrlhf": "version.txt"}
KINDS = ("passed", "failed", "skipped")


@dataclass
class Run:
    """outcomes: test -> passed, failed or skipped; errors: failed test -> exception.

    calls: replaced function -> how often it was called, and how often our op served; left: function -> why not replaced
    """

    outcomes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    calls: dict[str, tuple[int, int]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def add_calls(self, calls: dict[str, tuple[int, int]], left: dict[str, str]) -> None:
        for path, (count, served) in calls.items():
            before = self.calls.get(path, (0, 0))
            self.calls[path] = (before[0] + count, before[1] + served)
        self.left |= left


@dataclass
class Tally:
    """A trainer's tests, plain and patched."""

    peer: str
    checkout: Path
    tests: list[str] = field(default_factory=list)
    plain: Run = field(default_factory=Run)
    patched: Run = field(default_factory=Run)

    @property
    def lost(self) -> list[str]:
        """The tests that pass plain and not patched."""
        passed = (test for test, outcome in self.plain.outcomes.items() if outcome == "passed")
        return sorted(test for test in passed if self.patched.outcomes.get(test) != "passed")

    @property
    def title(self) -> str:
        version = (self.checkout / VERSION_FILES[self.peer]).read_text().strip()
        return f"{NAMES[self.peer]} {version}, commit {commit(self.checkout)}"

    def text(self) -> str:
        lines = [f"{self.title}, {len(self.tests)} test files"]
        for kind, run in (("plain", self.plain), ("patched", self.patched)):
            counts = collections.Counter(run.outcomes.values())
            numbers = "  ".join(f"{counts[outcome]} {outcome}" for outcome in KINDS)
            lines.append(f"{kind:<8}{numbers}  in {run.seconds:.0f} s")
        lines += [f"{path}: {said(*called)}" for path, called in self.patched.calls.items()]
        lines += [f"left alone {path}: {why}" for path, why in self.patched.left.items()]
        return "\n".join([*lines, self.verdict()])

    def verdict(self) -> str:
        kept = f"Patched passes all {list(self.plain.outcomes.values()).count('passed')} tests that plain passes."
        return "\n".join(f"passes plain, not patched: {test}" for test in self.lost) or kept

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", self.verdict(), ""]
        lines += ["| tests | plain: passed | failed | skipped | patched: passed | failed | skipped |"]
        lines += ["|---|" + "---:|" * 6]
        for file in self.tests:
            cells = [n for run in (self.plain, self.patched) for n in counted(run, file)]
            lines.append(f"| `{file}` | " + " | ".join(map(str, cells)) + " |")
        lines += ["", "| replaced | in these tests |", "|---|---|"]
        lines += [f"| `{path}` | {said(*called)} |" for path, called in self.patched.calls.items()]
        lines += [f"| `{path}` | left alone: {why.splitlines()[0]} |" for path, why in self.patched.left.items()]
        reasons = collections.Counter(self.plain.errors.values()).most_common()
        if reasons:
            lines += ["", "Fail plain: " + ", ".join(f"{count} by {reason}" for reason, count in reasons) + "."]
        return "\n".join([*lines, ""])


def document(tallies: list[Tally]) -> str:
    """All tallies as a Markdown page."""
    packages = ("torch", "transformers", "accelerate", "peft", "datasets", "ray")
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
    head = f"""# Trainers' own tests, plain and patched

Written by `python -m tests.peers.run --write`; do not edit. Ours: commit {commit(Path(__file__).parents[2])}.
{versions}.
No network and no GPU. "Served" calls of a replacement were computed by our op, the others handed to the original,
which docs/integrations.md says when.
"""
    return "\n".join([head, *(tally.markdown() for tally in tallies)])


def said(calls: int, served: int) -> str:
    return f"{calls} calls, {served} served" if calls else "never called: only `pytest tests/peers` compares it"


def counted(run: Run, file: str) -> list[int]:
    module = file.removesuffix(".py").replace("/", ".")
    found = (o for test, o in run.outcomes.items() if test == module or test.startswith((f"{module}.", f".{module}")))
    counts = collections.Counter(found)
    return [counts[outcome] for outcome in KINDS]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def commit(folder: Path) -> str:
    """The commit of a checkout, with a + where its code was changed; "unknown" outside git."""
    git = ["git", "-C", str(folder)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    status = [*git, "status", "--porcelain", "-uno", "--", "*.py", "csrc"]
    changed = subprocess.run(status, capture_output=True, text=True, check=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
