"""Message trees of OpenAssistant, as rankings of the replies to one message.

Format: github.com/LAION-AI/Open-Assistant, oasst-data (schemas.py: ExportMessageTree, ExportMessageNode) and the cards
of OpenAssistant/oasst1 and oasst2: a tree a line, or a message a line (Parquet too), joined by `parent_id`. Replies to
one message have a `rank`, 0 for the best, where they were ranked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastrlhf.data.importers._parts import number_of
from fastrlhf.data.report import Reason, Rejected
from fastrlhf.errors import DataError

COLUMNS = (("message_tree_id", "prompt"), ("message_tree_id", "message_id", "parent_id", "text", "role"))
ROLES = {"prompter": "user", "assistant": "assistant"}
Row = dict[str, Any]


def trees(rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    """Yields (number of its first message, tree) of rows that are messages; rows that are trees as they are.

    Raises: DataError for a message_id that is no text or occurs twice."""
    messages: dict[str, tuple[int, Row]] = {}
    for number, row in rows:
        if "prompt" in row:
            yield number, row
        elif not isinstance(row["message_id"], str) or row["message_id"] in messages:
            raise DataError(f"data: row {number}: message_id {row['message_id']!r} is no text, or was there before")
        else:
            messages[row["message_id"]] = number, {**row, "replies": []}
    roots = []
    for number, message in messages.values():
        parent = messages.get(message["parent_id"])
        if parent:
            parent[1]["replies"].append(message)
        else:
            whole = message["parent_id"] is None
            roots.append((number, {**message, "prompt": message if whole else None}))
    yield from roots


def convert(row: Mapping[str, Any], config: object) -> Iterator[Row | Rejected]:
    """Yields a ranking for each message that has several ranked replies by the assistant, wherever in the tree."""
    if not isinstance(row["prompt"], Mapping):
        raise Rejected(Reason.MISSING_COLUMN, "prompt, the message that a tree begins with")
    waiting: list[tuple[Mapping[str, Any], list[Row]]] = [(row["prompt"], [])]  # a message, and the thread before it
    while waiting:
        message, before = waiting.pop(0)
        if message.get("deleted"):
            yield Rejected(Reason.DELETED)
            continue
        role = str(message.get("role"))
        thread = [*before, {"role": ROLES.get(role, role), "content": message.get("text")}]
        replies = message.get("replies") or []
        waiting += [(reply, thread) for reply in replies]
        answers = [reply for reply in replies if reply.get("role") == "assistant" and not reply.get("deleted")]
        ranked = [answer for answer in answers if answer.get("rank") is not None]
        if len(answers) == 1:
            yield Rejected(Reason.ONE_RESPONSE)
        elif len(ranked) < len(answers):
            yield Rejected(Reason.UNRANKED, f"{len(answers) - len(ranked)} of {len(answers)}")
        if len(ranked) > 1:
            yield _ranking(thread, ranked, row["message_tree_id"])


def _ranking(thread: list[Row], ranked: list[Row], tree: Any) -> Row | Rejected:
    try:
        ranks = [number_of(answer["rank"], "rank") for answer in ranked]
    except Rejected as rejected:  # what stands below is not lost with it
        return rejected
    return {"prompt": thread, "responses": [answer.get("text") for answer in ranked], "ranks": ranks, "tree": tree}
