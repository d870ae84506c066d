"""Files to token ids: which loader takes which columns, and what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from fastrlhf.data.conversations import (
    Answer,
    Conversation,
    answer_message,
    conversation,
    message_text,
    messages_of,
    preference_of,
    prompt_of,
    response_of,
    text_of,
    tools_of,
)
from fastrlhf.data.files import data_files, folders_left_out, how_to_check, read_rows
from fastrlhf.data.lengths import check_characters, with_length_check
from fastrlhf.data.rendering import Message
from fastrlhf.data.report import Reason, Rejected, Report
from fastrlhf.data.rows import REWARD_ARGUMENTS, Demonstration, Loaded, Prompt
from fastrlhf.data.template import Renderer
from fastrlhf.errors import DataError, UserError
from fastrlhf.settings.objects import RowsSource, given

T = TypeVar("T")
Row = Mapping[str, Any]
Columns = tuple[str, ...]

# the columns that each loader takes; of those that a file has, the first
PROMPT_COLUMNS: tuple[Columns, ...] = (("prompt",), ("messages",), ("chosen", "rejected"))
DEMONSTRATION_COLUMNS: tuple[Columns, ...] = (
    ("prompt", "completion"),
    ("messages",),
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("text",),
)


def load_prompts(
    path: RowsSource,
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    template: str = "auto",
    template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Loaded[Prompt]:
    """Returns the prompts of a file: its prompt column, or what stands before the last answer of its messages or of
    its preference pairs. Every other column is kept, null as None.

    max_prompt_tokens: longer prompts are rejected; template, template_kwargs: see `Renderer`; options: those of `_load`

    Raises: DataError."""
    renderer = Renderer(tokenizer, template, template_kwargs)

    def make(row: Row, used: Columns) -> Prompt:
        if used == ("prompt",):
            prompt = prompt_of(row["prompt"])
        elif used == ("messages",):
            messages = conversation(row["messages"])
            prompt = prompt_of(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
        else:
            prompt, _, _ = preference_of(row, chat=renderer.chat)
        check_characters(prompt, tokenizer, max_prompt_tokens, Reason.PROMPT_TOO_LONG)
        tokens = renderer.prompt(prompt, tools_of(row))
        if len(tokens) > max_prompt_tokens:
            raise Rejected(Reason.PROMPT_TOO_LONG, f"{len(tokens)}, more than max_prompt_tokens = {max_prompt_tokens}")
        columns = {name: value for name, value in row.items() if name not in used}
        return Prompt(tokens, _as_text(prompt), columns, prompt)

    loaded = _load(path, "prompts", PROMPT_COLUMNS, make, notes=renderer.notes, **options)
    own = set(REWARD_ARGUMENTS) & {name for row in loaded.rows for name in row.columns}
    if own:  # a function that asks for one of them by name is refused (scorer.py)
        loaded.report.notes.append(
            f"columns not used, as reward functions have arguments so named: {', '.join(sorted(own))}"
        )
    return loaded


def load_demonstrations(path: RowsSource, tokenizer: Any, *, max_tokens: int, **options: Any) -> Loaded[Demonstration]:
    """Returns the demonstrations of a file: completions, assistant turns, the chosen side of preference pairs, or whole
    texts, of which all tokens but the first are learned.

    max_tokens: longer ones are rejected; options: those of `load_responses`

    Raises: DataError."""

    def make(renderer: Renderer, row: Row, used: Columns) -> Demonstration:
        if used == ("text",):
            tokens = renderer.text(text_of(row["text"], Reason.EMPTY_TEXT))
            demonstration = Demonstration(tokens, [False] + [True] * (len(tokens) - 1))
        elif used == ("messages",):
            demonstration = _assistant_turns(row["messages"], renderer, tools_of(row))
        else:
            if "completion" in used:
                prompt, response = prompt_of(row["prompt"]), response_of(row["completion"])
            else:
                prompt, response, _ = preference_of(row, chat=renderer.chat)
            demonstration = _answered(renderer, prompt, response, tools_of(row))
        if len(demonstration.tokens) > max_tokens:
            raise Rejected(Reason.TOO_LONG, f"{len(demonstration.tokens)} tokens, {max_tokens} allowed")
        if not any(demonstration.response_mask):
            raise Rejected(Reason.NO_RESPONSE_TOKEN)
        return demonstration

    return load_responses(
        path, tokenizer, "demonstrations", DEMONSTRATION_COLUMNS, make, max_tokens=max_tokens, **options
    )


def load_responses(
    path: RowsSource,
    tokenizer: Any,
    wanted: str,
    accepted: Sequence[Columns],
    make: Callable[[Renderer, Row, Columns], T],
    *,
    max_tokens: int,
    known: Columns = (),
    template: str = "auto",
    template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Loaded[T]:
    """Makes rows that hold responses, each of at most max_tokens tokens.

    known: further columns that `make` reads, besides `tools` with a chat template
    template, template_kwargs: see `Renderer`; options: max_rejected, limit and offset of `_load`"""
    renderer = Renderer(tokenizer, template, template_kwargs)
    columns = (*known, "tools") if renderer.chat else known
    made = with_length_check(partial(make, renderer), tokenizer, max_tokens)
    return _load(path, wanted, accepted, made, known=columns, notes=renderer.notes_on_ends, **options)


def _load(
    path: RowsSource,
    wanted: str,
    accepted: Sequence[Columns],
    make: Callable[[Row, Columns], T],
    *,
    known: Columns = (),
    notes: Sequence[str] = (),
    max_rejected: float = 0.01,
    limit: int | None = None,
    offset: int = 0,
) -> Loaded[T]:
    """Makes the rows of a file; counts those that `make` rejects. The first row's columns decide for all.

    known: further columns that `make` reads; notes: what else is to be said
    max_rejected: the largest share of rejected rows that is no error; offset, limit: skip so many rows, read so many

    Raises: DataError."""
    if not 0 <= max_rejected <= 1 or offset < 0 or (limit is not None and limit < 1):
        raise UserError(
            "data: max_rejected must be between 0 and 1, offset at least 0 and limit at least 1, got "
            f"{max_rejected}, {offset} and {limit}"
        )
    source = given("data", path, "rows")
    report, rows, used = Report(str(source)), [], None
    files = data_files(source)
    if len(files) > 1:
        report.notes.append(f"{len(files)} files: {', '.join(file.name for file in files)}")
    if left := folders_left_out(source, files):
        report.notes.append(f"folders with rows that are not read: {', '.join(left[:5])}{', ...' if left[5:] else ''}")
    for place, (number, row) in enumerate(read_rows(source)):
        if place < offset:
            continue
        if report.num_rows == limit:
            break
        if used is None:
            used = _columns(source, row, wanted, accepted)
            report.notes += [*_notes(wanted, row, used, known), *notes]
        report.num_rows += 1
        try:
            missing = [name for name in used if row.get(name) is None]
            if missing:
                raise Rejected(Reason.MISSING_COLUMN, missing[0])
            rows.append(make(row, used))
        except Rejected as rejected:
            report.reject(number, rejected.reason, rejected.detail)
    _check(report, max_rejected, offset)
    return Loaded(rows, report)


def _check(report: Report, max_rejected: float, offset: int) -> None:
    if report.num_rows == 0:
        raise DataError(f"data: {report.path} has no rows" + (f" after the first {offset}" if offset else ""))
    if report.num_used == 0:
        raise DataError(f"data: no row can be used\n{report}")
    if report.num_rejected > max_rejected * report.num_rows:
        knobs = {Reason.TOO_LONG: "max_length", Reason.PROMPT_TOO_LONG: "max_prompt_tokens"}
        longer = "".join(f", raise {knobs[why]} to take the long ones" for why in knobs if why in report.rejected)
        raise DataError(
            f"data: {report.num_rejected} of {report.num_rows} rows rejected, more than max_rejected = "
            f"{max_rejected:g} allows; mend the rows{longer}, or raise max_rejected to go on without them\n{report}"
        )


def _columns(path: RowsSource, row: Row, wanted: str, accepted: Sequence[Columns]) -> Columns:
    for columns in accepted:
        if row.keys() >= set(columns):
            return columns
    layouts = "; ".join(" + ".join(columns) for columns in accepted)
    labelled = wanted == "preference pairs" and row.keys() >= {"prompt", "completion", "label"}
    hint = "; kto reads labelled responses, and reward with --objective outcome" if labelled else ""
    found = ", ".join(row) or "(none)"
    raise DataError(
        f"data: {path} has the columns {found}; {wanted} are read from: {layouts}{hint}{how_to_check(path)}"
    )


def _notes(wanted: str, row: Row, used: Columns, known: Columns) -> list[str]:
    """What the reader of a file should know about how it is read."""
    notes = []
    if wanted == "demonstrations" and "chosen" in used:
        notes.append("the chosen responses of the preference pairs serve as demonstrations")
    unused = [name for name in row if name not in (*used, *known)]
    if unused and wanted != "prompts":
        notes.append(f"columns not used: {', '.join(unused)}")
    return notes


def answers_of(
    renderer: Renderer,
    prompt: Conversation,
    answers: Sequence[Answer],
    *,
    finished: Sequence[bool] = (),
    tools: Any = None,
) -> tuple[list[int], list[list[int]]]:
    """The tokens of a prompt, and those of each response to it: at least one, then, if it is finished, its end.

    finished: of each response, all by default. Raises: Rejected."""
    ends = finished or [True] * len(answers)
    start, responses = renderer.answers(prompt, answers, ends, tools)
    for response, ended in zip(responses, ends, strict=True):
        if len(response) < 1 + ended:
            raise Rejected(Reason.NO_RESPONSE_TOKEN)
        if not renderer.chat and renderer.end in response[: len(response) - ended]:
            raise Rejected(Reason.END_INSIDE)
    return start, responses


def _answered(renderer: Renderer, prompt: Conversation, answer: Answer, tools: Any) -> Demonstration:
    """A prompt with a response, which is what is learned."""
    if renderer.chat:
        turns = messages_of(prompt)
        return _learning(renderer, [*turns, answer_message(answer)], [len(turns)], tools)
    start, (end,) = answers_of(renderer, prompt, [answer])
    return Demonstration(start + end, [False] * len(start) + [True] * len(end))


def _assistant_turns(value: Any, renderer: Renderer, tools: Any = None) -> Demonstration:
    """Every assistant turn of a conversation, its end included, is a response, except those of weight 0."""
    messages = conversation(value)
    if messages[-1]["role"] != "assistant":
        raise Rejected(Reason.ASSISTANT_NOT_LAST)
    return _learning(renderer, messages, [n for n, m in enumerate(messages) if m.get("weight", 1) == 1], tools)


def _learning(renderer: Renderer, messages: Sequence[Message], learned: Sequence[int], tools: Any) -> Demonstration:
    """A conversation in which the assistant's turns of these numbers are learned."""
    tokens = renderer.conversation(messages, tools)
    mask = [False] * len(tokens.ids)
    for number, start, stop in tokens.turns:
        if number in learned:
            mask[start:stop] = [True] * (stop - start)
    return Demonstration(tokens.ids, mask)


def _as_text(prompt: Conversation) -> str:
    """A prompt as text, for reward functions: its own, or its turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message_text(message)}" for message in prompt)
