"""The plots of the trust report, as SVG images in HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from fastrlhf.evaluation.plots import AFTER, BEFORE, GREY, axes, image
from fastrlhf.stats.accuracy import wilson_interval


def reliability(curves: dict[str, dict[str, list[float]]]) -> Markup:
    """How often the label agrees by how sure the scores are, of each curve by its name, with 95 % intervals."""
    figure, axis = axes("Sureness and truth", "probability of the preferred response", "share where the label agrees")
    axis.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", label="calibrated")
    for (name, curve), color in zip(curves.items(), (AFTER, BEFORE), strict=False):
        for x, share, num in zip(curve["predicted"], curve["observed"], curve["counts"], strict=True):
            axis.plot([x, x], wilson_interval(share, num), color=color, linewidth=2, alpha=0.3)
        axis.plot(curve["predicted"], curve["observed"], color=color, marker="o", markersize=4, label=name)
    axis.set_xlim(0.49, max(0.7, *(x for curve in curves.values() for x in curve["predicted"])) + 0.02)
    axis.set_ylim(min(0.4, *(low for curve in curves.values() for low in curve["observed"])) - 0.1, 1.02)
    axis.legend(frameon=False, fontsize=9)
    return image(figure, "Reliability curve")


def accuracies(title: str, names: Sequence[str], results: Sequence[dict[str, Any]]) -> Markup:
    """Accuracy of each of several sets of pairs with its interval, from top to bottom, and the line of guessing."""
    figure, axis = axes(title, "accuracy and its 95 % interval", "")
    figure.set_size_inches(4.6, max(2.0, 1.1 + 0.27 * len(names)))
    places = range(len(names))
    for place, result in zip(places, results, strict=True):
        axis.plot([result["low"], result["high"]], [place, place], color=AFTER, linewidth=2, alpha=0.5)
    axis.plot([result["accuracy"] for result in results], places, "o", color=AFTER)
    axis.axvline(0.5, color=GREY, linestyle="--")
    axis.set_yticks(list(places), [name if len(name) <= 28 else f"{name[:27]}…" for name in names])
    axis.set_xlim(min(0.45, *(result["low"] for result in results)) - 0.02, 1.02)
    axis.set_ylim(len(names) - 0.4, -0.6)
    return image(figure, title)


def margins_over_length(points: Sequence[Sequence[float]]) -> Markup:
    """Each pair by how much longer the better response is, and how much higher it scores."""
    figure, axis = axes("Score and length of chosen less rejected", "length difference, tokens", "score difference")
    axis.axhline(0, color=GREY, linewidth=1)
    axis.axvline(0, color=GREY, linewidth=1)
    axis.scatter(*zip(*points, strict=True), s=9, color=AFTER, alpha=0.5, linewidths=0)
    return image(figure, "Score difference over length difference, a point a pair")
