"""Rows that a model is to judge or to revise: prompts, with responses or without, each checked."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastrlhf.data import Prompt, Reason, Rejected, Report, read_rows
from fastrlhf.data.conversations import (
    Conversation,
    message_text,
    only_text,
    preference_of,
    prompt_of,
    response_of,
    tools_of,
)
from fastrlhf.data.lengths import NO_LIMIT, check_characters
from fastrlhf.data.report import LEFT_OUT
from fastrlhf.data.template import Renderer
from fastrlhf.errors import DataError, UserError
from fastrlhf.runtime.atomic_io import write_file

Row = dict[str, Any]
# columns that say which response is better, by how much and by whom: an earlier label, so not kept beside a new one
LABELS = {"preference", "margin", "weight", "rater", "orders", "agrees", "gold_chosen", "gold_rejected"}
LABELS |= {"ranks", "label", "rating", "ratings"}
# what takes rows that are rejected for a reason, where a setting does
ADVICE = {
    Reason.LOW_MASS: "lower min_mass (0 takes whatever the judge says), or mend how it is asked (answers, rubric)",
    Reason.UNSEEN: "raise judge_top",
    Reason.PROMPT_TOO_LONG: "raise max_prompt_tokens",
    Reason.CUT_OFF: "raise max_new_tokens",
    Reason.TOO_LONG: "take a judge that reads more, or shorter rows",
}
ENDS = {"finished", "chosen_finished", "rejected_finished"}


@dataclass(frozen=True)
class FeedbackRow:
    """A row with a number (from 1): its prompt, its responses, whether each ended by itself, and its other columns.

    labelled: its file says that the first of two responses is the better one; label: what else it says of that"""

    number: int
    prompt: Conversation
    responses: tuple[str, ...] = ()
    finished: tuple[bool, ...] = ()
    columns: Row = field(default_factory=dict)
    labelled: bool = False
    label: Row = field(default_factory=dict)


def read_items(path: str, *, limit: int | None, bare: bool, chat: bool = True) -> tuple[list[FeedbackRow], Report]:
    """Returns the usable rows of a file, and the report on all of them.

    bare: take prompts alone; otherwise each row has its responses: `responses`, `completion`, or chosen and rejected
    chat: HH-RLHF text becomes messages; otherwise it stays text

    Raises: DataError for a file that is none, or whose first row has no such columns."""
    report, items = Report(path), []
    for number, row in read_rows(path):
        if report.num_rows == limit:
            break
        if report.num_rows == 0:
            _check_columns(path, row, bare)
        report.num_rows += 1
        try:
            items.append(_item(number, row, bare, chat))
        except Rejected as rejected:
            report.reject(number, rejected.reason, rejected.detail)
    if not items:
        raise DataError(f"data: no row can be used\n{report}")
    return items, report


def _check_columns(path: str, row: Row, bare: bool) -> None:
    pair, responses = {"chosen", "rejected"} <= row.keys(), row.keys() & {"responses", "completion"}
    if pair or ("prompt" in row and (bare or responses)):
        return
    wanted = "prompt" if bare else "prompt + responses, prompt + completion"
    advice = "; prompts alone are answered with --policy" if "prompt" in row else ""
    raise DataError(f"data: {path} has the columns {', '.join(row)}; read are: {wanted}; chosen + rejected{advice}")


def _item(number: int, row: Row, bare: bool, chat: bool) -> FeedbackRow:
    texts: tuple[str, ...] = ()
    pair = row.get("chosen") is not None and row.get("rejected") is not None
    if pair:
        prompt, *both = preference_of(row, chat=chat)
        texts = tuple(map(only_text, both))
        finished = tuple(row.get(f"{side}_finished") is not False for side in ("chosen", "rejected"))
    else:
        prompt = prompt_of(row.get("prompt"))
        if not bare:
            given = row.get("responses", row.get("completion"))
            if given is None:
                raise Rejected(Reason.MISSING_COLUMN, "responses")
            texts = tuple(only_text(response_of(each)) for each in (given if isinstance(given, list) else [given]))
        finished = (row.get("finished") is not False,) * len(texts)
    for text in (prompt, *texts):
        check_characters(text, None, NO_LIMIT)
    used = {"prompt", "responses", "completion", "chosen", "rejected", *LABELS, *ENDS}
    columns = {name: value for name, value in row.items() if name not in used}
    if bare:
        return FeedbackRow(number, prompt, columns=columns)
    return FeedbackRow(number, prompt, texts, finished, columns, pair, {k: v for k, v in row.items() if k in LABELS})


def check_same_items(path: Path, items: Sequence[FeedbackRow]) -> None:
    """Notes a checksum of the items in a file, or compares them with it.

    Raises: ValueError where a resumed run's items are not those that it began with."""
    checksum = zlib.crc32(repr([(item.number, item.prompt, item.responses) for item in items]).encode())
    if not path.exists():
        write_file(path, f"{checksum}\n".encode())
    elif path.read_text(encoding="utf-8").strip() != str(checksum):
        raise UserError(
            f"resume: the rows of the data are not those that {path} is of; give the same, or --overwrite to start anew"
        )


def check_two(item: FeedbackRow) -> None:
    """Raises Rejected unless the item has two responses that are not the same."""
    if len(item.responses) != 2:
        raise Rejected(Reason.NOT_TWO, f"{len(item.responses)}")
    if not all(text.strip() for text in item.responses):
        raise Rejected(Reason.EMPTY_RESPONSE)
    if item.responses[0].strip() == item.responses[1].strip():
        raise Rejected(Reason.SAME)


def as_pair(item: FeedbackRow) -> Row:
    """An item of two responses, the better one first, as a row of preferences."""
    chosen, rejected = item.responses
    ends = dict(zip(("chosen_finished", "rejected_finished"), item.finished, strict=True))
    return {"prompt": item.prompt, "chosen": chosen, "rejected": rejected, **ends, **item.columns, **item.label}


def check_rejection_rate(report: Report, max_rejected: float) -> None:
    """Raises DataError when more than this share of all rows has been rejected, with what would take them."""
    if report.num_faults > max_rejected * report.num_rows:
        counts = f"{report.num_faults} of {report.num_rows} rows rejected, more than max_rejected = {max_rejected:g}"
        most = max(set(report.rejected).difference(LEFT_OUT), key=lambda reason: len(report.rejected[reason]))
        advice = f"{ADVICE.get(most, 'mend them')}, or raise max_rejected to go on without them"
        raise DataError(f"data: {counts} allows; {advice}\n{report}")


def as_prompt(item: FeedbackRow, renderer: Renderer, max_tokens: int) -> Prompt:
    """What an engine answers and a function scores. Raises: Rejected for more than so many tokens."""
    check_characters(item.prompt, renderer.tokenizer, max_tokens, Reason.PROMPT_TOO_LONG)
    tokens = renderer.prompt(item.prompt, tools_of(item.columns))
    if len(tokens) > max_tokens:
        raise Rejected(Reason.PROMPT_TOO_LONG, f"{len(tokens)}, more than {max_tokens}")
    return Prompt(tokens, as_text(item.prompt), item.columns)


def as_text(prompt: Conversation) -> str:
    """A prompt as a judge reads it: its own text, or its turns with their roles."""
    if isinstance(prompt, str):
        return prompt.strip()
    if len(prompt) == 1:
        return str(prompt[0]["content"]).strip()
    return "\n\n".join(f"{message['role'].capitalize()}: {message_text(message).strip()}" for message in prompt)


def read_text(path: str, option: str) -> str:
    """The text of a file; raises ValueError naming the option where there is none, or nothing in it."""
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {path} cannot be read as text: {error}") from None
    if not text:
        raise UserError(f"{option}: {path} is empty")
    return text


def rejected_by_reason(report: Report) -> dict[str, int]:
    """How many rows were rejected for each reason."""
    return {str(reason): len(rows) for reason, rows in report.rejected.items()}
