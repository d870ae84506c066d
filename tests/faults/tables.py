"""The campaign's results as tables of Markdown: by fault, and by command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from outcomes import BAD, GOOD

ENDS = (*GOOD, *BAD)


def tables(notes: Iterable[dict[str, Any]]) -> str:
    """notes: a line for each trial"""
    found = [row for row in notes if "ended" in row]
    kills = sum(row["kills"] for row in found)
    skipped = sum(row["ended"] == "skipped" for row in found)
    minutes = sum(row["seconds"] for row in found) / 60
    head = f"""# What faults cost
Written by `make faults`: {len(found) - skipped} trials with {kills} kills, {minutes:.0f} minutes one after the other;
{skipped} were skipped (root may read everything). right: equals an undisturbed run bit for bit; told: but for what a
warning names; refused: one message says why, nothing is changed; read: hostile input was used, or counted as
rejected. What is bad: lost (work), wrong (another result with status 0), traceback, unclear (message), unescaped
(characters that a terminal obeys), hung (a process).

"""
    return head + _table("fault", found) + "\n" + _table("command", found)


def _table(by: str, found: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row[by] for row in sorted(found, key=lambda row: (row["kind"], row[by]))))
    lines = [f"| {by} | trials | {' | '.join(ENDS)} |", f"|---|{'---:|' * (1 + len(ENDS))}"]
    for name in names:
        counts = Counter(row["ended"] for row in found if row[by] == name)
        counts.pop("skipped", None)
        if counts:
            cells = [str(counts[end] or "") for end in ENDS]
            lines.append(f"| {name} | {sum(counts.values())} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
