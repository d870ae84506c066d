"""Prompts, demonstrations, and responses that were judged, from files. docs/data.md shows every layout.

A row that cannot be used is rejected with a reason, counted and shown; more than a stated share of them is an error.
Nothing is cut or dropped in silence.
"""

from fastrlhf.data.files import read_rows
from fastrlhf.data.judged import (
    RATING,
    Judged,
    Labelled,
    Pair,
    Ranking,
    Rated,
    layout_of,
    load_labelled,
    load_pairs,
    load_rankings,
    load_ratings,
    verdict_of,
)
from fastrlhf.data.loading import load_demonstrations, load_prompts
from fastrlhf.data.order import SPLIT, batch_rows, shuffled, stream
from fastrlhf.data.report import Reason, Rejected, Report
from fastrlhf.data.rows import Demonstration, Loaded, Prompt

__all__ = [
    "RATING",
    "SPLIT",
    "Demonstration",
    "Judged",
    "Labelled",
    "Loaded",
    "Pair",
    "Prompt",
    "Ranking",
    "Rated",
    "Reason",
    "Rejected",
    "Report",
    "batch_rows",
    "layout_of",
    "load_demonstrations",
    "load_labelled",
    "load_pairs",
    "load_prompts",
    "load_rankings",
    "load_ratings",
    "read_rows",
    "shuffled",
    "stream",
    "verdict_of",
]
