"""Preference pairs from a gold reward: which of two responses to a prompt is better, by a rule in place of people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastrlhf.errors import UserError
from fastrlhf.evaluation.answers import Answers

Row = dict[str, Any]


def label_pairs(answers: Answers, prompts: list[Any]) -> tuple[list[Row | None], dict[str, int]]:
    """Returns a preference row for each pair of neighbours (0, 1), (2, 3), ..., None where the pair is of no use, and
    the counts: pairs, ties (equal gold reward), empty (a response without text), kept.

    answers: 2P responses judged by "gold"; prompts: P prompts as they are to stand in the rows

    Raises: ValueError unless there are two answers to each prompt."""
    gold = answers.judgements["gold"].tolist()
    if len(gold) != 2 * len(prompts):
        raise UserError(f"label_pairs: expected 2 answers to each of {len(prompts)} prompts, got {len(gold)}")
    counts = {"pairs": len(prompts), "ties": 0, "empty": 0, "kept": 0}
    rows: list[Row | None] = []
    for pair, prompt in enumerate(prompts):
        better, worse = sorted((2 * pair, 2 * pair + 1), key=lambda n: -gold[n])
        rows.append(None)
        if gold[better] == gold[worse]:
            counts["ties"] += 1
        elif not (answers.texts[better].strip() and answers.texts[worse].strip()):
            counts["empty"] += 1
        else:
            counts["kept"] += 1
            rows[-1] = {"prompt": prompt, **_side("chosen", answers, better), **_side("rejected", answers, worse)}
    return rows, counts


def split_by_prompt(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Returns the rows to train on and those held out, no prompt on both sides: the last prompts, until a share of the
    rows is held out, and at least one prompt.

    Raises: ValueError for rows of a single prompt."""
    keys = [json.dumps(row["prompt"]) for row in rows]
    counts = Counter(keys)
    if len(counts) < 2:
        raise UserError(f"{len(rows)} pairs are left, all on one prompt; to hold some out takes two prompts")
    held_out: set[str] = set()
    for key in reversed(keys):
        if held_out and sum(counts[each] for each in held_out) >= round(share * len(rows)):
            break
        held_out.add(key)
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row, key in zip(rows, keys, strict=True):
        parts[key in held_out].append(row)
    return parts


def _side(name: str, answers: Answers, n: int) -> Row:
    return {
        name: answers.texts[n],
        f"{name}_finished": answers.samples[n].finished,
        f"gold_{name}": answers.judgements["gold"][n].item(),
    }
