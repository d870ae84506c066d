"""The page of the trust report: what page.html.j2 shows."""

from __future__ import annotations

import json
from typing import Any

from fastrlhf.commands.reward_report import plots
from fastrlhf.commands.reward_report.findings import findings, verdict
from fastrlhf.evaluation.html import render

Summary = dict[str, Any]
BINS = {
    "length": ("by length", "tokens of a response, mean of both"),
    "length_difference": ("by length difference", "tokens, chosen - rejected"),
    "score_margin": ("by score difference", "its size"),
    "label_margin": ("by label margin", "as the file gives it"),
}


def page(summary: Summary, *, with_plots: bool) -> str:
    """Returns the page, which needs no other file. summary: of `summarize`, and `files`"""
    calibration = summary["calibration"]
    scales = {"as they are": "raw", "divided by the temperature": "scaled"}
    return render(
        "commands/reward_report/page.html.j2",
        summary=summary,
        verdict=verdict(summary),
        findings=findings(summary),
        bins=[(*BINS[kind], list(map(ends, found)), found) for kind, found in summary["bins"].items()],
        scales={name: calibration[key] for name, key in scales.items() if key in calibration},
        curves={name: calibration[f"{key}_curve"] for name, key in scales.items() if key in calibration},
        figures=as_json(summary),
        plots=plots if with_plots else None,
    )


def ends(result: Summary) -> str:
    """From where to where a bin goes."""
    low, high = (f"{round(result[end], 3):g}" for end in ("from", "to"))
    return low if low == high else f"{low} to {high}"


def as_json(summary: Summary) -> str:
    """The figures without the points of plots and the texts."""
    shown = {key: value for key, value in summary.items() if key not in ("errors", "files")}
    shown["length"] = {key: value for key, value in summary["length"].items() if key != "points"}
    return json.dumps(shown, indent=1)
