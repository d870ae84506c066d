"""The page of the trust report."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from fastrlhf.commands.reward_report import parts
from fastrlhf.commands.reward_report.findings import findings, verdict
from fastrlhf.evaluation.html import STYLE, capital

Summary = dict[str, Any]


def page(summary: Summary, *, with_plots: bool) -> str:
    """Returns the page, which needs no other file. summary: of `summarize`, and `files`"""
    said = findings(summary)
    body = [
        f"<h1>How far can {escape(' + '.join(summary['models']))} be trusted?</h1>",
        f'<p class="verdict">{escape(capital(verdict(summary)))}.</p>',
        "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in said) + "</ul>" if said else "",
        parts.note(
            "A pair counts as right when its chosen response scores higher, as half right when both score alike. "
            "Intervals are Wilson's, for as many independent pairs as the file is worth: those on one prompt are not."
        ),
        f"<details><summary>Files</summary><pre>{escape(chr(10).join(summary['files']))}</pre></details>",
    ]
    for part in parts.PARTS:
        body += part(summary, with_plots)
    body.append(f"<h2>All figures</h2><details><summary>summary.json</summary><pre>{as_json(summary)}</pre></details>")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Trust report</title>',
            f"<style>{STYLE}</style>",
            *(part for part in body if part),
            "</html>\n",
        ]
    )


def as_json(summary: Summary) -> str:
    """The figures without the points of plots and the texts."""
    shown = {key: value for key, value in summary.items() if key not in ("errors", "files")}
    shown["length"] = {key: value for key, value in summary["length"].items() if key != "points"}
    return escape(json.dumps(shown, indent=1))
