"""Parts of the HTML reports: their style, tables, and sentences that several of them have."""

from __future__ import annotations

from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 980px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
.verdict { font-size: 1.15em; background: #eef4fa; border-left: 4px solid #1f6fb4; padding: .7em 1em; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .25em .8em .25em 0; vertical-align: top; }
th { border-bottom: 1px solid #999; } .number { text-align: right; font-variant-numeric: tabular-nums; }
.samples td { border-bottom: 1px solid #eee; font-size: .92em; } img { max-width: 49%; } .note { color: #666; }
"""


def table(head: list[str], rows: list[list[str]], *, kind: str = "") -> str:
    """An HTML table; cells are escaped."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f'<table class="{kind}">' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def reward_model_line(last: dict[str, Any]) -> str:
    """The held-out accuracy with its confidence interval, of the reward model's last metrics."""
    interval = f"95 % interval {last['eval/accuracy_low']:.1%} to {last['eval/accuracy_high']:.1%}"
    return f"accuracy {last['eval/accuracy']:.1%} on {last['eval/num_pairs']} held-out pairs ({interval})"
