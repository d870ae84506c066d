"""UltraFeedback: several models' completions of an instruction, each with ratings.

Format: github.com/OpenBMB/UltraFeedback, README "Dataset Format", and the card of openbmb/UltraFeedback: `instruction`
and `completions`, each with `model`, `response`, `overall_score` (1 to 10) and `annotations`: by aspect, an object with
`Rating`, a number as text, or "N/A" where the aspect does not apply (src/data_annotation/fix_overall_score_issue.py,
which also defines the mean of the aspects).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastrlhf.data.importers._parts import number_of
from fastrlhf.data.report import Reason, Rejected
from fastrlhf.settings.data import DataConvertConfig

COLUMNS = (("instruction", "completions"),)
Row = dict[str, Any]


def convert(row: Mapping[str, Any], config: DataConvertConfig) -> Iterator[Row | Rejected]:
    """Yields a ranking of the completions by config.score, equal where their scores are; with config.ratings a rated
    row a completion."""
    completions = row["completions"]
    if not isinstance(completions, list) or not all(isinstance(each, Mapping) for each in completions):
        raise Rejected(Reason.MISSING_COLUMN, "completions")
    if not config.ratings:
        yield _ranking(row["instruction"], completions, config)
        return
    for each in completions:
        try:
            ratings = _ratings(each)
        except Rejected as rejected:
            yield rejected
            continue
        yield {
            "prompt": row["instruction"],
            "completion": each.get("response"),
            "ratings": ratings,
            "model": each.get("model"),
        }


def _ratings(completion: Mapping[str, Any]) -> dict[str, float]:
    """The overall score, and the rating of each aspect that applies."""
    ratings = {"overall": number_of(completion.get("overall_score"), "overall_score")}
    for aspect, annotation in (completion.get("annotations") or {}).items():
        rating = annotation.get("Rating") if isinstance(annotation, Mapping) else None
        if rating != "N/A":
            ratings[aspect] = number_of(rating, aspect)
    return ratings


def _ranking(prompt: Any, completions: list[Mapping[str, Any]], config: DataConvertConfig) -> Row:
    if len(completions) < 2:
        raise Rejected(Reason.ONE_RESPONSE, f"{len(completions)} completions")
    scores = []
    for completion in completions:
        ratings = _ratings(completion)
        aspects = [rating for name, rating in ratings.items() if name != "overall"]
        if config.score == "mean" and aspects:
            ratings["mean"] = sum(aspects) / len(aspects)
        scores.append(number_of(ratings.get(config.score), config.score))
    levels = sorted(set(scores), reverse=True)
    if config.ties == "reject" and len(levels) < len(scores):
        raise Rejected(Reason.TIE)
    return {
        "prompt": prompt,
        "responses": [completion.get("response") for completion in completions],
        "ranks": [levels.index(score) for score in scores],
        "scores": scores,
        "models": [completion.get("model") for completion in completions],
    }
