"""Control tokens, and texts that spell them: what people and models write stays text, whatever it looks like.

A control token is a special token of the tokenizer, or another added one that its chat template puts around a turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fastrlhf.data.report import Reason, Rejected

Span = tuple[int, int]
# code points that stand for no character: put around what is spelled, so that it can be found in what a template writes
MARKS = tuple((chr(0xFDD0 + n), chr(0xFDD1 + n)) for n in range(0, 32, 2))
# what control tokens look like, where there is no tokenizer to ask
LOOKS = r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|</?s>|<(?:bos|eos|pad|unk|(?:start|end)_of_turn)>|\[/?INST\]"  # noqa: RUF001


def added_tokens(tokenizer: Any, *, special: bool = False) -> dict[str, int]:
    """The texts of a tokenizer's added tokens with their ids, but white space; special: only those that are special."""
    added = tokenizer.added_tokens_decoder.items()
    found = {token.content: i for i, token in added if token.special or not special}
    found |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=False))
    return {text: i for text, i in found.items() if text.strip()}


class Controls:
    """The control tokens of a tokenizer. more: the texts of those that are not special"""

    def __init__(self, tokenizer: Any, more: Iterable[str] = ()) -> None:
        self.ids = added_tokens(tokenizer)
        self.texts = {*added_tokens(tokenizer, special=True), *more}
        self.pattern = _any_of(self.texts)
        self.normal = self._normalised(tokenizer)

    def first_in(self, text: str) -> str | None:
        """The first added token in what a template wrote."""
        found = _any_of(self.ids).search(text)
        return found[0] if found else None

    def _normalised(self, tokenizer: Any) -> tuple[Callable[[str], str], re.Pattern[str]] | None:
        """How the tokenizer changes a text before it looks for some control tokens, and a pattern that finds these."""
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        found = [each.content for each in tokenizer.added_tokens_decoder.values() if each.normalized]
        texts = [text for text in found if text in self.texts]
        if normalizer is None or not texts:
            return None
        return normalizer.normalize_str, _any_of(map(normalizer.normalize_str, texts))

    def spelled(self, text: str) -> list[str]:
        """What spells a control token in a text, as the tokenizer finds it."""
        found: list[str] = self.pattern.findall(text)
        if self.normal is None:
            return found
        normalise, pattern = self.normal
        return [*found, *pattern.findall(normalise(self.pattern.sub("", text)))]

    def mark(self, value: Any) -> tuple[Any, tuple[str, str] | None]:
        """(value with marks around all that spells a control token in it, the marks); None: nothing does."""
        if not any(self.pattern.search(text) for text in texts_in(value)):
            return value, None
        everything = "".join(texts_in(value))
        marks = next((marks for marks in MARKS if not any(mark in everything for mark in marks)), None)
        if marks is None:
            raise Rejected(Reason.NOT_UNICODE, "code points that stand for no character")
        return changed(value, lambda text: self.pattern.sub(f"{marks[0]}\\g<0>{marks[1]}", text)), marks


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the texts, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text)))) or "(?!)")


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_in(item)


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {changed(key, change): changed(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [changed(item, change) for item in value]
    return value


def unmarked(text: str, marks: tuple[str, str] | None) -> tuple[str, list[Span], Callable[[int], int]]:
    """(text without marks, the spans that stood between them, where a place of the marked text is now).

    A template may separate the two marks. A single mark becomes an empty span, so that the texts on its sides do not
    join."""
    if marks is None:
        return text, [], lambda place: place
    start, end = marks
    places = [found.start() for found in re.finditer(f"[{start}{end}]", text)]
    spans: list[Span] = []
    for n, place in enumerate(places):
        if text[place] == start and n + 1 < len(places) and text[places[n + 1]] == end:
            spans.append((place - n, places[n + 1] - n - 1))
        elif text[place] == start or n == 0 or text[places[n - 1]] != start:
            spans.append((place - n, place - n))
    return re.sub(f"[{start}{end}]", "", text), spans, lambda place: place - sum(p < place for p in places)


class Quoted(str):
    """A plain text some spans of which others wrote: what these spell stays text, also without a chat template."""

    spans: Sequence[Span] = ()

    @classmethod
    def of(cls, *parts: tuple[str, bool]) -> Quoted:
        """The text of parts (text, whether others wrote it)."""
        spans: list[Span] = []
        length = 0
        for text, quoted in parts:
            inner = getattr(text, "spans", ())
            spans += [(length, length + len(text))] if quoted else [(length + a, length + b) for a, b in inner]
            length += len(text)
        made = cls("".join(text for text, _ in parts))
        made.spans = spans
        return made
