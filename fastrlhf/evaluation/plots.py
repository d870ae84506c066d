"""The plots of the report, as SVG images in HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

BEFORE, AFTER, GREY = "#8a8f98", "#1f6fb4", "#c9cdd3"
Rows = Sequence[dict[str, Any]]


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def svg(figure: Any, *, fonts: str = "none") -> bytes:
    """The figure as a file, the same bytes for the same numbers. fonts: none leaves texts as texts, path draws them"""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "fastrlhf", "svg.fonttype": fonts}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def image(figure: Any, text: str) -> Markup:
    """The figure as an HTML image with a text for those who cannot see it."""
    data = base64.b64encode(svg(figure, fonts="path")).decode()
    return Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(text, data)


def axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    """A figure and its one pair of axes."""
    figure, (axis,) = panels([title], x, y, size=(4.6, 3.0))
    return figure, axis


def panels(titles: Sequence[str], x: str, y: str, *, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure and its pairs of axes side by side, one a title. size: of all, inches"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    found = list(figure.subplots(1, len(titles), squeeze=False)[0])
    for axis, title in zip(found, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, found


def curve(rows: Rows, name: str, title: str, y: str, *, low: float | None = None, high: float | None = None) -> Markup:
    """A metric over the steps that have it."""
    figure, axis = axes(title, "step", y)
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    axis.plot([step for step, _ in points], [value for _, value in points], color=AFTER, marker=".")
    axis.set_ylim(low, high)
    axis.xaxis.get_major_locator().set_params(integer=True)
    return image(figure, f"{title} by step")


def reward_over_kl(rows: Rows) -> Markup:
    """Each PPO step as a point: what was gained, and how far the policy went for it."""
    figure, axis = axes("Reward model score over KL", "KL to the SFT policy, nats a response", "score")
    kl, scores = [row["objective/kl"] for row in rows], [row["objective/scores"] for row in rows]
    axis.plot(kl, scores, color=GREY, linewidth=1)
    axis.scatter(kl, scores, c=[row["step"] for row in rows], cmap="Blues", edgecolors=AFTER, vmin=-len(rows) / 2)
    for n in (0, -1):
        axis.annotate(f"step {rows[n]['step']}", (kl[n], scores[n]), xytext=(5, 5), textcoords="offset points")
    return image(figure, "Score of the reward model over KL, a point a step")


def gold_distribution(rows: Rows) -> Markup:
    """Histograms of the gold reward of held-out answers before and after."""
    figure, axis = axes("Gold reward of held-out answers", "gold reward", "answers")
    columns = [[row[f"gold_{when}"] for row in rows] for when in ("before", "after")]
    low, high = min(map(min, columns)), max(map(max, columns))
    bins = [low + (high - low) * n / 12 for n in range(13)] if high > low else 1
    axis.hist(columns, bins=bins, color=[BEFORE, AFTER], label=["before PPO", "after PPO"])
    axis.legend(frameon=False)
    return image(figure, "Histogram of the gold reward before and after PPO")


def calibration_plot(points: dict[str, list[float]]) -> Markup:
    """How often the reward model is right, by how sure it is; on the line it is calibrated."""
    figure, axis = axes("Reward model: sureness and truth", "predicted probability", "share where gold agrees")
    axis.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--")
    axis.plot(points["predicted"], points["observed"], color=AFTER, marker="o")
    for x, y, count in zip(points["predicted"], points["observed"], points["counts"], strict=True):
        axis.annotate(f"{count}", (x, y), xytext=(4, -12), textcoords="offset points", fontsize=8)
    axis.set_ylim(0, 1.05)
    return image(figure, "Calibration of the reward model")


def gold_over_score(rows: Rows) -> Markup:
    """Each held-out answer by what the reward model and the gold reward say of it."""
    figure, axis = axes("Gold reward over reward model score", "reward model score", "gold reward")
    for when, color in (("before", BEFORE), ("after", AFTER)):
        x, y = [row[f"reward_{when}"] for row in rows], [row[f"gold_{when}"] for row in rows]
        axis.scatter(x, y, s=12, color=color, alpha=0.7, label=f"{when} PPO", linewidths=0)
    axis.legend(frameon=False)
    return image(figure, "Gold reward over the reward model's score, a point an answer")
