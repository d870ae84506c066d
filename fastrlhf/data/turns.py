"""Which part of a rendered conversation the assistant writes: from where its generation prompt ends to its end token.

What the template writes at the borders is learned from renderings of made-up words, once a tokenizer:

    generation prompt   ...question<|im_end|>\\n<|im_start|>assistant\\n
    rendered answer     ...question<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nanswer<|im_end|>\\n

A turn starts where the two part, here before <think>. So the model learns to write just what it samples, as far as the
rendering allows: a generation prompt may go on where the rendering does not, as with an open <think>.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastrlhf.data.controls import Controls
from fastrlhf.data.encoding import common_start
from fastrlhf.data.rendering import ChatTemplate, Message, Rendering, Skeleton, called, skeleton_of, word
from fastrlhf.data.report import Rejected


@dataclass(frozen=True)
class Turn:
    """Places in a rendering. said: where the last text of the turn ends; stop: behind its end token, if it has one.

    end: the token that ends such a turn, None: the template writes none"""

    number: int
    start: int
    said: int
    stop: int
    ended: bool
    end: str | None


class Turns:
    """Finds the assistant's turns in what a chat template writes.

    end: the token that ends a turn, None: the template writes none; header: the generation prompt itself
    asked, answered: a question with its generation prompt, and an answered one, as the template renders them

    Raises: ValueError for a template that fails, or that does not write an answer as it is."""

    def __init__(self, template: ChatTemplate, controls: Controls, name: str) -> None:
        self.template, self.controls, self.name = template, controls, name
        self.asked, self.answered = self._probe()
        asked, answered, twice = skeleton_of(self.asked), skeleton_of(self.answered), self._tried(_talk(4))
        if (num := answered.slots.count((1, "content"))) != 1:
            raise self._refusal(f"writes the assistant's answer {num} times where it should once")
        answer = answered.slots.index((1, "content"))
        prompt, before, after = asked.fixed[-1], answered.fixed[answer], answered.fixed[answer + 1]
        bare = self._tried(_talk(1))
        closing = common_start(bare.fixed[-1], prompt) if bare and asked.slots else 0
        known = (
            asked.slots and answered.slots[:answer]
        )  # without the question in the rendering the answer's start cannot be found
        befores, afters = [before], [after]
        if twice and (1, "content") in twice.slots:
            place = twice.slots.index((1, "content"))
            befores.append(twice.fixed[place])
            afters.append(twice.fixed[place + 1])
        starts = [common_start(prompt, each) for each in befores] if known else []
        self.headers = [prompt[closing:start] for start in sorted({*starts}, reverse=True) if start > closing]
        self.added = before[starts[0] :] if starts else ""
        found = [controls.first_in(each) for each in afters]
        # GLM's template writes none behind the last answer: a turn ends where the user's token begins the next
        self.end, self.ends_last = found[0] or found[-1], found[0] is not None
        self.ends, self.tokens = {each for each in found if each}, tuple(controls.ids)
        self.header = prompt[closing:]
        self.written = prompt + before + after

    @functools.cached_property
    def call_end(self) -> str | None:
        """The token that ends a turn with calls. Where a turn ends as the next begins, that is the tool's."""
        talk = called('{"a": 1}' if self.template.takes_text else {"a": 1}, {"content": ""})
        answer = {"role": "tool", "name": word(1, "call"), "tool_call_id": "123456789", "content": word(2, "content")}
        try:
            before, after = self.template.render(talk).rstrip(), self.template.render([*talk, answer])
        except Rejected:
            return self.end
        return (self.controls.first_in(after[len(before) :]) if after.startswith(before) else None) or self.end

    def _probe(self) -> tuple[str, str]:
        """A question with its generation prompt, and one that is answered."""
        try:
            return self.template.render(_talk(1), generation=True), self.template.render(_talk(2))
        except Rejected as rejected:
            raise self._refusal(f"fails on a question and its answer ({rejected.detail})") from rejected

    def _tried(self, messages: Sequence[Message]) -> Skeleton | None:
        try:
            return skeleton_of(self.template.render(messages))
        except Rejected:
            return None

    def _refusal(self, why: str) -> ValueError:
        remedy = (
            "put one that can be followed into the folder as chat_template.jinja, or use plain texts and template none"
        )
        return ValueError(f"template: the chat template of {self.name!r} {why}; {remedy}")

    def of(self, messages: Sequence[Message], rendering: Rendering, tools: Any, marks: str = "") -> list[Turn]:
        """The turns of the assistant in the rendering of a conversation.

        marks: the two that stand around texts that look like tokens and are none"""
        spans: dict[int, tuple[int, int, int]] = {}  # of each turn: behind the text before it, its first, its last
        before, seen = 0, set()
        for place in rendering.places:
            number = place.slot[0]
            # what a tool answers may be headed by the call's own name
            if number >= 0 and messages[number]["role"] == "assistant" and place.slot not in seen:
                gap, start, _ = spans.get(number, (before, place.start, 0))
                spans[number] = (gap, start, place.stop)
            before = place.stop
            seen.add(place.slot)
        stops = {place.start for place in rendering.places}
        turns = []
        for number, (gap, first, said) in spans.items():
            start, end = gap + self._start(rendering.text[gap:first]), self.end
            limit = min((stop for stop in stops if stop >= said), default=len(rendering.text))
            stop = self._stop(rendering.text, said, limit, marks)
            if stop is None:
                stop = self._stop_by_rendering(messages[: number + 1], rendering.text, said, tools)
                if not self.ends_last and messages[number].get("tool_calls") and self.call_end:
                    end = self.call_end
                    stop += len(end) if rendering.text.startswith(end, stop) else 0
            turns.append(Turn(number, start, said, stop, rendering.text.endswith(self.tokens, said, stop), end))
        return sorted(turns, key=lambda turn: turn.start)

    def _start(self, gap: str) -> int:
        """Where in the text in front of a turn's first text the turn starts."""
        for header in self.headers:
            place = gap.rfind(header)
            if place >= 0:
                return place + len(header)
        return len(gap) - len(self.added) if not self.headers and gap.endswith(self.added) else len(gap)

    def _stop(self, text: str, said: int, limit: int, marks: str) -> int | None:
        """The place behind the first token that ends a turn, of those that the template wrote."""
        found = []
        for end in self.ends:
            place = text.find(end, said, limit)
            while marks and place > 0 and text[place - 1] == marks[0]:
                place = text.find(end, place + 1, limit)
            if place >= 0:
                found.append(place + len(end))
        return min(found, default=None)

    def _stop_by_rendering(self, messages: Sequence[Message], text: str, said: int, tools: Any) -> int:
        """Where the rendering of a conversation up to a turn ends, but for white space: calls of tools often end with
        another token, and a template may write none."""
        try:
            rendered = self.template.render(messages, tools).rstrip()
        except Rejected:
            return said
        return len(rendered) if len(rendered) > said and text.startswith(rendered) else said


def _talk(num: int) -> list[Mapping[str, Any]]:
    """So many messages, of made-up words."""
    return [{"role": ("user", "assistant")[n % 2], "content": word(n, "content")} for n in range(num)]
