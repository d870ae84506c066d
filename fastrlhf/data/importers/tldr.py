"""Comparisons of summaries from "Learning to summarize from human feedback" (TL;DR and CNN/DM).

Format: github.com/openai/summarize-from-feedback, README "Comparisons": `info` (`post`, `title`, `subreddit`; of CNN/DM
`article`, `title`), `summaries` (two, each with `text` and `policy`), `choice` (0 or 1), `worker`, `batch`, `split`,
and `extra`, which may hold `confidence`. What its numbers mean is not written there, so it stays a column. Only with
soft_labels it is read as a place on a scale from 1, the first is better, to 9, the second is, and a row whose choice is
on the other side of 5 is rejected: many of those mean that the scale is another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastrlhf.data.importers._parts import number_of, pair
from fastrlhf.data.report import Reason, Rejected
from fastrlhf.settings.data import DataConvertConfig

COLUMNS = (("info", "summaries", "choice", "worker"),)


def convert(row: Mapping[str, Any], config: DataConvertConfig) -> Iterator[dict[str, Any]]:
    """Yields a pair with its rater, split, policies and confidence, with soft_labels as its preference.

    The prompt is that of their models (summarize_from_feedback/utils/experiment_helpers.py, query.format_str)."""
    summaries, choice = row["summaries"], row["choice"]
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, Mapping) for s in summaries):
        raise Rejected(Reason.NOT_TWO, "summaries")
    if choice not in (0, 1):
        raise Rejected(Reason.BAD_LABEL, f"choice is {choice!r}")
    columns = {"rater": row["worker"], "split": row.get("split"), "batch": row.get("batch")}
    confidence = (row.get("extra") or {}).get("confidence")
    if confidence is not None:
        columns["confidence"] = confidence
    policies = tuple(summary.get("policy") for summary in summaries)
    texts = [summary.get("text") for summary in summaries]
    made = pair(_prompt(row["info"]), texts, 1 if choice else -1, config, policy=policies, **columns)
    if config.soft_labels:
        made["preference"] = _preference(confidence, choice)
    yield made


def _preference(confidence: Any, choice: int) -> float:
    """How probable it is that the chosen summary is better, if the scale is linear."""
    place = number_of(confidence, "extra.confidence")
    if not 1 <= place <= 9 or (place - 5) * (2 * choice - 1) < 0:
        raise Rejected(Reason.BAD_LABEL, f"confidence is {place}, choice {choice}; it is no place on a scale 1 ... 9")
    second = (place - 1) / 8
    return second if choice else 1 - second


def _prompt(info: Any) -> str:
    parts = info if isinstance(info, Mapping) else {}
    if isinstance(parts.get("post"), str):
        subreddit = parts.get("subreddit") or ""
        return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {parts.get('title') or ''}\n\nPOST: {parts['post']}\n\nTL;DR:"
    if isinstance(parts.get("article"), str):
        return f"Article:\n{parts['article']}\n\nTL;DR:\n"
    raise Rejected(Reason.MISSING_COLUMN, "info has neither post nor article")
