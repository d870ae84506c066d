"""What a chat template writes, and where in it each message stands.

A template is a program: it may trim what it is given, put a system message elsewhere, leave out the reasoning of
earlier turns. Where a message stands is therefore not guessed from the text. The conversation is rendered twice: as it
is, and with a made-up word in place of each text. The second rendering tells what the template writes around the texts,
and the first must be just that with the texts in it. Rows of one shape share the second rendering.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastrlhf.data.report import Reason, Rejected

Message = Mapping[str, Any]
Slot = tuple[int, str]  # number of the message, -1 for the tools; which of its texts
# templates such as Llama 3's write today's date into the system message, and a run would change overnight
DATE = "26 Jul 2024"
DIRECTIVES = {
    "Y": "2024",
    "y": "24",
    "m": "07",
    "d": "26",
    "e": "26",
    "b": "Jul",
    "h": "Jul",
    "B": "July",
    "A": "Friday",
}
DIRECTIVES |= {
    "-d": "26",
    "-m": "7",
    "a": "Fri",
    "j": "208",
    "H": "00",
    "I": "12",
    "M": "00",
    "S": "00",
    "p": "AM",
    "F": "2024-07-26",
}
# in front of a template that asks for the date: no version of transformers lets a caller say what strftime_now is
NO_CLOCK = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f".replace('%{letter}', '{text}')" for letter, text in DIRECTIVES.items())
    + " -}}{%- endmacro %}\n"  # jinja takes the line feed away, and the template begins on a line of its own
)
WORD = re.compile(r"Zq(\d+)([a-z]+\d*)qZ")  # the made-up words
THOUGHTS = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*?)(\s*)", re.DOTALL)  # in front of an answer
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing


@dataclass(frozen=True)
class Skeleton:
    """What a template writes around texts. fixed: the pieces between the slots, one more than there are slots"""

    fixed: list[str]
    slots: list[Slot]


@dataclass(frozen=True)
class TextSpan:
    """Where a text stands in a rendering."""

    slot: Slot
    start: int
    stop: int


@dataclass(frozen=True)
class Rendering:
    """What the template writes of a conversation, and where its texts stand, in the order of the rendering."""

    text: str
    places: list[TextSpan] = field(default_factory=list)


class ChatTemplate:
    """The chat template of a tokenizer, with the keywords that it gets."""

    def __init__(self, tokenizer: Any, keywords: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.keywords = {"date_string": DATE, **(keywords or {})}
        self.skeletons: dict[str, Skeleton] = {}
        self.keys: dict[str, bool] = {}  # of messages: whether the template reads them

    @functools.cached_property
    def takes_text(self) -> bool:
        """Whether the arguments of calls must be JSON, as DeepSeek's templates want them; most take objects."""
        tried: Iterator[tuple[Any, Any]] = itertools.product(
            ({"a": 1}, '{"a": 1}'), ({}, {"content": ""}, {"content": None})
        )
        for given, content in tried:
            try:
                if word(1, "call") in self.render(called(given, content)):
                    return isinstance(given, str)
            except Rejected:
                continue
        return False

    def render(self, messages: Sequence[Message], tools: Any = None, *, generation: bool = False) -> str:
        """What the template writes; generation: up to where the assistant's answer starts.

        Raises: Rejected where the template fails."""
        options = {**self.keywords, "add_generation_prompt": generation}
        if tools:
            options["tools"] = tools
        try:
            template = self._template(tools)
            if template is not None:
                options["chat_template"] = template
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
        except Exception as error:  # a template is a program, and fails as programs do
            kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
            said = " ".join(str(error).split()) or "it says no more"
            raise Rejected(Reason.TEMPLATE_REFUSES, f"{kind}{said}") from error

    def _template(self, tools: Any) -> str | None:
        """The template without a clock; None: it has none."""
        if not hasattr(self.tokenizer, "get_chat_template"):
            return None
        template = self.tokenizer.get_chat_template(tools=tools)
        return NO_CLOCK + template if "strftime_now" in template else None

    def locate(self, messages: Sequence[Message], tools: Any = None) -> Rendering:
        """What the template writes of a conversation, and where its texts stand.

        Raises: Rejected where the template fails, leaves out or rewrites what it is given."""
        text = self.render(messages, tools)
        places = self.places(text, messages, tools)
        if places is None:  # what it writes depends on what is said
            answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
            values, worded, _ = _worded(messages, tools, answers)
            places = _match(text, self._skeleton(worded, None), values)
        if places is None:
            raise Rejected(Reason.TEMPLATE_REWRITES, "it changes what an answer says")
        _check_answers(messages, places)
        self.check_all(messages, tools)
        return Rendering(text, places)

    def places(
        self, text: str, messages: Sequence[Message], tools: Any = None, *, generation: bool = False
    ) -> list[TextSpan] | None:
        """Where the texts of a conversation stand in its rendering; None where the template writes other things around
        them than around made-up words."""
        values, worded, shape = _worded(messages, tools, range(len(messages)))
        try:
            return _match(text, self._skeleton(worded, shape, generation=generation), values)
        except Rejected:
            return None

    def check_all(self, messages: Sequence[Message], tools: Any = None, *, generation: bool = False) -> None:
        """Raises Rejected where the template leaves out tools, tool messages or calls, a system message, or the
        reasoning of the last answer."""
        if not tools and all(message["role"] in ("user", "assistant") and _plain(message) for message in messages):
            return
        values, worded, shape = _worded(messages, tools, range(len(messages)))
        found = set(self._skeleton(worded, shape, generation=generation).slots)
        last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        for n, name in values.keys() - found:
            role = messages[n]["role"] if n >= 0 else "tools"
            if name in ("reasoning", "thoughts"):
                if n == last and not generation:
                    raise Rejected(Reason.NOT_RENDERED, "the reasoning of the last answer (reasoning_content, <think>)")
            elif name.startswith("call"):
                raise Rejected(Reason.NOT_RENDERED, "tool_calls")
            elif role in ("tool", "tools", "system"):
                what = {"tool": "messages of role tool", "tools": "tools", "system": "system messages"}[role]
                raise Rejected(Reason.NOT_RENDERED, what)

    def _skeleton(self, worded: tuple[list[Message], Any], shape: str | None, *, generation: bool = False) -> Skeleton:
        key = None if shape is None else f"{generation} {shape}"
        if key in self.skeletons:
            return self.skeletons[key]
        skeleton = skeleton_of(self.render(*worded, generation=generation))
        if key is not None and len(self.skeletons) < 1000:
            self.skeletons[key] = skeleton
        return skeleton


def word(number: int, name: str) -> str:
    """A made-up word, to stand for a text of a message."""
    return f"Zq{number + 1}{name}qZ"


def called(arguments: Any, content: Mapping[str, Any]) -> list[Message]:
    """A question and the call of a tool, by a made-up word."""
    call = {"id": "123456789", "type": "function", "function": {"name": word(1, "call"), "arguments": arguments}}
    return [{"role": "user", "content": "?"}, {"role": "assistant", **content, "tool_calls": [call]}]


def skeleton_of(text: str) -> Skeleton:
    """The skeleton that a rendering of made-up words shows."""
    found = list(WORD.finditer(text))
    starts, stops = [0, *(match.end() for match in found)], [*(match.start() for match in found), len(text)]
    fixed = [text[start:stop] for start, stop in zip(starts, stops, strict=True)]
    return Skeleton(fixed, [(int(match[1]) - 1, match[2]) for match in found])


def _plain(message: Message) -> bool:
    """Whether there is nothing to it but a text."""
    return not any(message.get(name) for name in (*REASONING, "tool_calls")) and "</think>" not in message.get(
        "content", ""
    )


def _worded(
    messages: Sequence[Message], tools: Any, which: Sequence[int]
) -> tuple[dict[Slot, str], tuple[list[Message], Any], str | None]:
    """(the texts by slot, messages and tools with words in their place, what rows of the same shape have in common).

    which: the messages whose texts are replaced"""
    values: dict[Slot, str] = {}

    def put(number: int, name: str, text: Any) -> Any:
        if not isinstance(text, str) or not text.strip():
            return text
        values[number, name] = text
        return word(number, name)

    made: list[Message] = []
    for n, message in enumerate(messages):
        if n not in which:
            made.append(message)
            continue
        new = dict(message)
        thinks = message["role"] == "assistant" and "</think>" in message.get("content", "")
        thoughts = THOUGHTS.fullmatch(message["content"]) if thinks else None
        if thoughts and thoughts[2].strip() and thoughts[4].strip():
            before, thought, between, answer, after = thoughts.groups()
            parts = (before, put(n, "thoughts", thought), between, put(n, "content", answer), after)
            new["content"] = "".join(parts)
        elif "content" in message:
            new["content"] = put(n, "content", message["content"])
        for name in REASONING:
            if message.get(name):
                new[name] = put(n, "reasoning", message[name])
        if message.get("tool_calls"):
            new["tool_calls"] = [_with_name(call, n, f"call{k}", put) for k, call in enumerate(message["tool_calls"])]
        made.append(new)
    named = [_with_name(tool, -1, f"tool{k}", put) for k, tool in enumerate(tools)] if tools else None
    shape = None if len(which) < len(messages) else json.dumps([made, named], default=str)
    return values, (made, named), shape


def _with_name(entry: Any, number: int, slot: str, put: Any) -> Any:
    """A tool or a call of one with a word in place of its name."""
    function = entry.get("function")
    if isinstance(function, Mapping):
        return {**entry, "function": {**function, "name": put(number, slot, function.get("name"))}}
    return {**entry, "name": put(number, slot, entry.get("name"))} if "name" in entry else entry


def _match(text: str, skeleton: Skeleton, values: Mapping[Slot, str]) -> list[TextSpan] | None:
    """Where the texts stand in a rendering; None where it is not the skeleton with the texts in it."""
    if not text.startswith(skeleton.fixed[0]):
        return None
    places, place = [], len(skeleton.fixed[0])
    for n, (slot, after) in enumerate(zip(skeleton.slots, skeleton.fixed[1:], strict=True)):
        last = n == len(skeleton.slots) - 1
        stops = (place + len(way) for way in _ways(values.get(slot, "")) if text.startswith(way, place))
        fits = (s for s in stops if text.startswith(after, s) and (not last or s + len(after) == len(text)))
        stop = next(fits, None)
        if stop is None:
            return None
        places.append(TextSpan(slot, place, stop))
        place = stop + len(after)
    return places if place == len(text) else None


def _ways(text: str) -> Iterator[str]:
    """How a template may write a text: as it is, trimmed, or as JSON."""
    yield text
    yield text.strip()
    yield text.strip("\n")
    yield text.rstrip()
    yield text.lstrip()
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text.strip(), ensure_ascii=False)[1:-1]


def _check_answers(messages: Sequence[Message], places: Sequence[TextSpan]) -> None:
    """Raises Rejected where an answer does not stand in the rendering once."""
    for n, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("content", "").strip():
            num = sum(place.slot == (n, "content") for place in places)
            if num != 1:
                raise Rejected(Reason.TEMPLATE_REWRITES, f"it writes an answer {num} times")
