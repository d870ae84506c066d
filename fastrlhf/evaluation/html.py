"""The HTML reports: pages from templates (*.html.j2 beside the commands), and what several of them say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from fastrlhf.runtime.jsonl import read_json
from fastrlhf.stats.means import with_error


def render(template: str, **values: Any) -> str:
    """Returns a page. template: its path inside the package; texts among the values are escaped.

    Raises: jinja2.UndefinedError for a value that the template reads and nobody gives."""
    return PAGES.get_template(template).render(values)


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def percent(share: float | None) -> str:
    """A share as text."""
    return "" if share is None else f"{share:.1%}".replace("%", " %")


def number(value: float | None) -> str:
    """A number as text; none where there is none, as of a constant's correlation."""
    return "none" if value is None else f"{value:.3f}"


def mean(value: dict[str, float]) -> str:
    """A mean with its standard error."""
    return with_error(value["mean"], value["error"])


def reward_model_line(last: dict[str, Any]) -> str:
    """The held-out accuracy with its confidence interval, of the reward model's last metrics."""
    interval = f"95 % interval {last['eval/accuracy_low']:.1%} to {last['eval/accuracy_high']:.1%}"
    return f"accuracy {last['eval/accuracy']:.1%} on {last['eval/num_pairs']} held-out pairs ({interval})"


def pairs_line(output: Path) -> str:
    """How many pairs the gold reward left, of those in an output folder."""
    counts = read_json(output / "pairs/counts.json")
    return "{kept} of {pairs} pairs kept; dropped: {ties} with equal gold reward, {empty} empty".format(**counts)


PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parents[1]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
PAGES.filters |= {of.__name__: of for of in (capital, percent, number, mean, with_error, repr)}
PAGES.globals["zip"] = zip
