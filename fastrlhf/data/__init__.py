"""Prompts, demonstrations and preference pairs from files. docs/data.md shows every layout.

A row that cannot be used is rejected with a reason, counted and shown; more than a stated share of them is an error.
Nothing is cut or dropped in silence.
"""

from fastrlhf.data.files import DataError, read_rows
from fastrlhf.data.loading import (
    Demonstration,
    Loaded,
    Pair,
    Prompt,
    load_demonstrations,
    load_pairs,
    load_prompts,
)
from fastrlhf.data.order import batch_rows, shuffled
from fastrlhf.data.report import Reason, Rejected, Report

__all__ = [
    "DataError",
    "Demonstration",
    "Loaded",
    "Pair",
    "Prompt",
    "Reason",
    "Rejected",
    "Report",
    "batch_rows",
    "load_demonstrations",
    "load_pairs",
    "load_prompts",
    "read_rows",
    "shuffled",
]
