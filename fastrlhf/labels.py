"""Preference pairs from a gold reward: which of two responses to a prompt is better, by a rule in place of people."""

from __future__ import annotations

from typing import Any

from fastrlhf.evaluate import Answers

Row = dict[str, Any]


def label_pairs(answers: Answers, prompts: list[Any]) -> tuple[list[Row | None], dict[str, int]]:
    """Returns a preference row for each pair of neighbours (0, 1), (2, 3), ..., None where the pair is of no use, and
    the counts: pairs, ties (equal gold reward), empty (a response without text), kept.

    answers: 2P responses judged by "gold"; prompts: P prompts as they are to stand in the rows

    Raises: ValueError unless there are two answers to each prompt."""
    gold = answers.judgements["gold"].tolist()
    if len(gold) != 2 * len(prompts):
        raise ValueError(f"label_pairs: expected 2 answers to each of {len(prompts)} prompts, got {len(gold)}")
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


def _side(name: str, answers: Answers, n: int) -> Row:
    return {
        name: answers.texts[n],
        f"{name}_finished": answers.samples[n].finished,
        f"gold_{name}": answers.judgements["gold"][n].item(),
    }
