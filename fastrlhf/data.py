"""Prompts, demonstrations and preference pairs from files. docs/data.md shows every layout.

A row that cannot be used is rejected with a reason, counted and shown; more than a stated share of them is an error.
Nothing is cut or dropped in silence.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from fastrlhf.template import Message, Renderer

T = TypeVar("T")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
LAYOUTS = (
    "prompt; prompt + completion; prompt + chosen + rejected; chosen + rejected (messages, or HH-RLHF text with "
    "Human: and Assistant: turns); messages; text"
)


class DataError(ValueError):
    """A file that cannot be used: missing, malformed, of unknown layout, or with too many rejected rows."""


class Rejected(Exception):
    """A row that cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Prompt:
    """tokens up to where the response starts; the prompt as text; the other columns of its row."""

    tokens: list[int]
    text: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Demonstration:
    """tokens of a conversation; response_mask is True for those that the model should learn to write."""

    tokens: list[int]
    response_mask: list[bool]


@dataclass(frozen=True)
class Pair:
    """prompt tokens, the tokens of the better and of the worse response, each with its end."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0


@dataclass
class Report:
    """How many rows a file has, and how many were rejected for which reason, with the first row number of each."""

    path: str
    num_rows: int = 0
    rejected: dict[str, list[int]] = field(default_factory=dict)

    @property
    def num_rejected(self) -> int:
        return sum(len(rows) for rows in self.rejected.values())

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.num_rows - self.num_rejected} of {self.num_rows} rows used"]
        for reason, rows in sorted(self.rejected.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(rows)} rejected: {reason} (first: row {rows[0]})")
        return "\n".join(lines)


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """The usable rows of a file, and the report on all of them."""

    rows: list[T]
    report: Report


def load_prompts(
    path: str | Path, tokenizer: Any, *, max_prompt_tokens: int, template: str = "auto", **options: Any
) -> Loaded[Prompt]:
    """Returns the prompts of a file: its prompt column, or the part before the last answer of a preference pair.

    max_prompt_tokens: longer prompts are rejected; options: those of `_load`"""
    renderer = Renderer(tokenizer, template)

    def make(row: dict[str, Any]) -> Prompt:
        if "prompt" in row:
            prompt = _conversation(row["prompt"])
        elif "chosen" in row:
            prompt, _, _ = _preference(row, renderer.chat)
        elif "messages" in row:
            prompt = _conversation(row["messages"])
        else:
            raise _unknown_layout(path, row, "prompts")
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            raise Rejected("the last turn is the assistant's, so there is nothing to answer")
        tokens = renderer.prompt(prompt)
        if len(tokens) > max_prompt_tokens:
            raise Rejected(f"the prompt has more than max_prompt_tokens = {max_prompt_tokens} tokens")
        columns = {k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected", "messages")}
        return Prompt(tokens, _text(prompt), columns)

    return _load(path, make, **options)


def load_demonstrations(
    path: str | Path, tokenizer: Any, *, max_tokens: int, template: str = "auto", **options: Any
) -> Loaded[Demonstration]:
    """Returns the demonstrations of a file: completions, assistant turns, chosen responses, or whole texts.

    max_tokens: longer ones are rejected; options: those of `_load`"""
    renderer = Renderer(tokenizer, template)

    def make(row: dict[str, Any]) -> Demonstration:
        if "messages" in row:
            demonstration = _every_turn(_conversation(row["messages"]), renderer)
        elif "text" in row:
            tokens = renderer.text(_string(row["text"]))
            demonstration = Demonstration(tokens, [False] + [True] * (len(tokens) - 1))
        else:
            if "completion" in row and "prompt" in row:
                prompt, response = _conversation(row["prompt"]), _answer(row["completion"])
            elif "chosen" in row:
                prompt, response, _ = _preference(row, renderer.chat)
            else:
                raise _unknown_layout(path, row, "demonstrations")
            start, end = renderer.prompt(prompt), renderer.response(response)
            demonstration = Demonstration(start + end, [False] * len(start) + [True] * len(end))
        if len(demonstration.tokens) > max_tokens:
            raise Rejected(f"it has more than {max_tokens} tokens")
        return demonstration

    return _load(path, make, **options)


def load_pairs(
    path: str | Path, tokenizer: Any, *, max_tokens: int, template: str = "auto", **options: Any
) -> Loaded[Pair]:
    """Returns the preference pairs of a file.

    max_tokens: pairs with a longer side are rejected; options: those of `_load`"""
    renderer = Renderer(tokenizer, template)

    def make(row: dict[str, Any]) -> Pair:
        if "chosen" not in row or "rejected" not in row:
            raise _unknown_layout(path, row, "preference pairs")
        prompt, chosen, rejected = _preference(row, renderer.chat)
        pair = Pair(
            renderer.prompt(prompt),
            renderer.response(chosen),
            renderer.response(rejected),
            float(row.get("margin", 0.0)),
        )
        if pair.chosen == pair.rejected:
            raise Rejected("chosen and rejected are the same")
        if len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) > max_tokens:
            raise Rejected(f"a side has more than {max_tokens} tokens")
        return pair

    return _load(path, make, **options)


def shuffled(num: int, *key: int) -> list[int]:
    """Returns 0 ... num - 1 in an order that follows from the key.

    torch's CPU generator keeps only the low 32 bits of a seed, so (seed << 32) + epoch would ignore the seed."""
    return np.random.default_rng(key).permutation(num).tolist()


def batch_rows(num_rows: int, batch_size: int, step: int, *, seed: int, total: int | None = None) -> list[int]:
    """Returns the rows of step 0, 1, ...: consecutive pieces of one endless stream of shuffled epochs.

    Each epoch's order follows from the seed and its number, so a resumed run needs only its step. total: the length of
    the stream, where it ends (the last batch may be smaller)"""
    start, stop = step * batch_size, (step + 1) * batch_size
    if total is not None:
        stop = min(stop, total)
    rows: list[int] = []
    while start < stop:
        epoch, offset = divmod(start, num_rows)
        rows += shuffled(num_rows, seed, epoch)[offset : offset + stop - start]
        start += min(num_rows - offset, stop - start)
    return rows


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSONL, JSONL.gz or Parquet file.

    Raises: DataError for a file that is missing or of another kind, and for a line that is no JSON object."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data: no file {str(path)!r}")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")):
        raise DataError(f"data: {path} must be .jsonl, .jsonl.gz or .parquet")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"data: {path}, line {number}: expected an object, got {type(row).__name__}")
                yield row
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"data: {path}, line {number}: not JSON ({error})") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError(f"data: reading {path} needs pyarrow: pip install 'fastrlhf[parquet]'") from None
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _load(
    path: str | Path,
    make: Callable[[dict[str, Any]], T],
    *,
    max_rejected: float = 0.01,
    limit: int | None = None,
    offset: int = 0,
) -> Loaded[T]:
    """Makes the rows of a file; rejects what `make` rejects.

    max_rejected: the largest share of rejected rows that is no error; offset, limit: skip the first rows, read so many

    Raises: DataError."""
    report, rows = Report(str(path)), []
    for number, row in enumerate(read_rows(path), 1):
        if number <= offset:
            continue
        if limit is not None and report.num_rows == limit:
            break
        report.num_rows += 1
        try:
            rows.append(make({k: v for k, v in row.items() if v is not None}))
        except Rejected as reason:
            report.rejected.setdefault(str(reason), []).append(number)
    if report.num_rows == 0:
        raise DataError(f"data: {path} has no rows" + (f" after row {offset}" if offset else ""))
    if report.num_rejected > max_rejected * report.num_rows or not rows:
        raise DataError(
            f"data: {report.num_rejected} of {report.num_rows} rows rejected, more than "
            f"max_rejected = {max_rejected:g} allows\n{report}"
        )
    return Loaded(rows, report)


def _unknown_layout(path: str | Path, row: dict[str, Any], wanted: str) -> DataError:
    return DataError(f"data: {path} has columns {sorted(row)}, which hold no {wanted}; known layouts: {LAYOUTS}")


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise Rejected(f"expected text, got {type(value).__name__}")
    if not value.strip():
        raise Rejected("empty text")
    return value


def _answer(value: Any) -> str:
    """A response: a text, or messages of which there is one, the assistant's."""
    if isinstance(value, list):
        if len(value) != 1 or value[0].get("role") != "assistant":
            raise Rejected("a response must be one assistant message")
        value = _content(value[0])
    if not isinstance(value, str):
        raise Rejected(f"expected text, got {type(value).__name__}")
    if not value.strip():
        raise Rejected("empty response")
    return value


def _content(message: Message) -> str:
    """The text of a message; a list of text parts is joined."""
    content = message.get("content")
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise Rejected("a message holds something other than text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Rejected(f"expected text in a message, got {type(content).__name__}")
    return content


def _conversation(value: Any) -> str | list[Message]:
    """A prompt as text, or as messages whose roles alternate: [system,] user, assistant, user, ..."""
    if not isinstance(value, list):
        if isinstance(value, str) and not value.strip():
            raise Rejected("empty prompt")
        return _string(value)
    if not value:
        raise Rejected("empty prompt")
    messages: list[Message] = [
        {**message, "content": _content(message)} for message in value if isinstance(message, dict)
    ]
    if len(messages) != len(value):
        raise Rejected("a message is no object with role and content")
    roles = [message.get("role") for message in messages]
    unknown = set(roles) - {"system", "user", "assistant"}
    if unknown:
        raise Rejected(f"unknown role {sorted(map(str, unknown))[0]!r}")
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2):
        raise Rejected("roles do not alternate user, assistant, user, ...")
    if any(not m["content"].strip() for m in messages if m["role"] == "assistant"):
        raise Rejected("empty response")
    if any(not m["content"].strip() for m in messages if m["role"] == "user"):
        raise Rejected("empty prompt")
    return messages


def _preference(row: dict[str, Any], chat: bool) -> tuple[str | list[Message], str, str]:
    """(prompt, chosen, rejected) of a preference row of any layout."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        prompt = _conversation(row["prompt"])
        if isinstance(chosen, list) and len(chosen) > 1 and not isinstance(prompt, str):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return prompt, _answer(chosen), _answer(rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        if chosen[:-1] != rejected[:-1]:
            raise Rejected("the prompts of chosen and rejected differ")
        _conversation(chosen)
        return _conversation(chosen[:-1]), _answer(chosen[-1:]), _answer(rejected[-1:])
    texts = _string(chosen), _string(rejected)
    if not all(ASSISTANT in text for text in texts):
        raise Rejected("no prompt column, and no HH-RLHF text with an Assistant: turn")
    (prompt_text, good), (other, bad) = (_split_hh(text) for text in texts)
    if prompt_text != other:
        raise Rejected("the prompts of chosen and rejected differ")
    messages = _hh_messages(prompt_text)
    if chat:
        return messages, _answer(good.strip()), _answer(bad.strip())
    return prompt_text, _answer(good), _answer(bad)


def _split_hh(text: str) -> tuple[str, str]:
    """Splits each side at its own last Assistant: turn."""
    start = text.rindex(ASSISTANT) + len(ASSISTANT)
    if HUMAN in text[start:]:
        raise Rejected("the last turn is not the assistant's")
    return text[:start], text[start:]


def _hh_messages(prompt: str) -> list[Message]:
    """The messages of an HH-RLHF prompt, which ends with an open Assistant: turn."""
    turns: list[Message] = []
    for piece in prompt.removesuffix(ASSISTANT).split("\n\n"):
        if piece.startswith(("Human:", "Assistant:")):
            role, _, content = piece.partition(":")
            turns.append({"role": "user" if role == "Human" else "assistant", "content": content.strip()})
        elif turns:
            turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n\n{piece}"}
        elif piece.strip():
            raise Rejected("text before the first Human: turn")
    conversation = _conversation(turns)
    assert not isinstance(conversation, str)
    return conversation


def _every_turn(messages: str | list[Message], renderer: Renderer) -> Demonstration:
    """Every assistant turn of a conversation, its end included, is a response."""
    if isinstance(messages, str):
        raise Rejected("messages must be a list")
    if messages[-1]["role"] != "assistant":
        raise Rejected("the last turn is not the assistant's")
    tokens: list[int] = []
    mask: list[bool] = []
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, response = renderer.prompt(messages[:n]), renderer.response(message["content"])
            if prompt[: len(tokens)] != tokens:
                raise Rejected("the chat template changes earlier turns, so turns cannot be told apart")
            mask += [False] * (len(prompt) - len(tokens)) + [True] * len(response)
            tokens = prompt + response
    return Demonstration(tokens, mask)


def _text(prompt: str | Sequence[Message]) -> str:
    """A prompt as text, for reward functions: its own, or its turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
