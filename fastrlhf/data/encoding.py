"""Texts to token ids, of which each knows its place in the text."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastrlhf.data.controls import Controls, Span, added_tokens
from fastrlhf.data.report import Reason, Rejected

TRIES = 4  # to find all control tokens that others spelled: taking one out may join what is on its two sides


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text; starts, ends: the places of its characters that each token stands for, rising."""

    ids: list[int]
    starts: Sequence[int]
    ends: Sequence[int]

    def from_(self, place: int) -> int:
        """The first token that reaches beyond a place of the text: a token across it counts as behind it."""
        return bisect_right(self.ends, place)

    def until(self, place: int) -> int:
        """How many tokens begin before a place of the text."""
        return bisect_left(self.starts, place)


def common_start(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common before they part."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


class Encoder:
    """Encodes texts with a tokenizer, and adds nothing to them.

    Texts that come one after the other often begin alike, as those of the responses to one prompt do. A special token
    cuts a text into two that are encoded apart, so the tokens before one that both texts have are taken over."""

    def __init__(self, tokenizer: Any, controls: Controls) -> None:
        self.tokenizer, self.controls = tokenizer, controls
        special = added_tokens(tokenizer, special=True)
        self.special, self.longest = {*special.values()}, max(map(len, special), default=0)
        # text may become the token for unknown words
        backend = getattr(tokenizer, "backend_tokenizer", None)
        unknown = getattr(tokenizer, "unk_token_id", None) if _has_unknown(backend) else None
        self.control = {controls.ids[each] for each in controls.texts} - {unknown}
        self.last: tuple[str, Encoded] = ("", Encoded([], (), ()))
        self.newline = self._piece("\n").ids

    def __call__(self, text: str, spans: Sequence[Span] = (), borders: Sequence[int] = ()) -> Encoded:
        """The tokens of a text; what stands in the spans is encoded apart, as text, whatever it spells.

        borders: places that will be asked about, in rising order: a tokenizer that tells no places is asked for them"""
        if not self.tokenizer.is_fast:
            return self._by_prefixes(text, spans, borders)
        if not spans:
            return self._like_the_last(text)
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        for start, stop, plain in _pieces(text, spans):
            piece = self._behind(text[start:stop], plain=plain) if start else self._first(text[:stop], plain=plain)
            ids += piece.ids
            starts += [start + place for place in piece.starts]
            ends += [start + place for place in piece.ends]
        return Encoded(ids, starts, ends)

    def guarded(
        self,
        text: str,
        spans: Sequence[Span],
        borders: Sequence[int] = (),
        *,
        others: Sequence[Span],
        forms: frozenset[str] | None = None,
    ) -> Encoded:
        """The tokens of a text, without control tokens that the tokenizer finds in what others wrote: it may normalise
        a text before it looks for them, or find one across the border of two texts.

        others: where others wrote; forms: how control tokens look elsewhere, None: in any way

        Raises: Rejected where what looks like a control token cannot be written as text."""
        others = sorted(span for span in others if span[0] < span[1])
        for _ in range(TRIES):
            encoded = self(text, spans, borders)
            found = self._forged(text, spans, encoded, others, forms)
            if not found:
                return encoded
            cuts = sorted({place for span in others for place in span} | {*borders})
            spans = sorted([*spans, *(piece for span in found for piece in _cut(span, cuts))])
        raise Rejected(Reason.SPELLS_CONTROL, repr(text[slice(*found[0])]))

    def _forged(
        self, text: str, spans: Sequence[Span], encoded: Encoded, others: Sequence[Span], forms: frozenset[str] | None
    ) -> list[Span]:
        """Where the control tokens stand that no template wrote."""
        if self.tokenizer.is_fast:
            places = [(encoded.starts[n], encoded.ends[n]) for n, i in enumerate(encoded.ids) if i in self.control]
        else:
            inside = [place for start, stop in spans for place in range(start, stop)]
            found = [match.span() for match in self.controls.pattern.finditer(text)]
            places = [span for span in found if span[0] not in inside]
            if sum(i in self.control for i in encoded.ids) > len(places):
                raise Rejected(Reason.SPELLS_CONTROL, "in a way that this tokenizer does not tell the place of")
        forged = []
        for first, last in places:
            part = text[first:last]  # a token may take the white space around it along
            start, stop = first + len(part) - len(part.lstrip()), last - len(part) + len(part.rstrip())
            n = bisect_left(others, start, key=lambda span: span[1])
            n += n < len(others) and others[n][1] == start
            touches = n < len(others) and others[n][0] < stop
            if start < stop and (touches or (forms is not None and text[start:stop] not in forms)):
                forged.append((start, stop))
        return forged

    def forms(self, *texts: str) -> frozenset[str]:
        """How the control tokens in texts of a template look, and how they are called."""
        encoded = [(text, self(text)) for text in texts] if self.tokenizer.is_fast else []
        found = [
            text[start:stop].strip()
            for text, each in encoded
            for i, start, stop in zip(each.ids, each.starts, each.ends, strict=True)
            if i in self.control
        ]
        return frozenset({*found, *self.controls.texts})

    def _like_the_last(self, text: str) -> Encoded:
        before, known = self.last
        same = _num_same(before, text) - self.longest
        cut = bisect_right(known.starts, same) - 1 if same >= 0 else 0
        while cut > 0 and known.ids[cut] not in self.special:
            cut -= 1
        if cut > 0:
            start, rest = known.starts[cut], self._piece(text[known.starts[cut] :])
            starts = [*known.starts[:cut], *(start + place for place in rest.starts)]
            ends = [*known.ends[:cut], *(start + place for place in rest.ends)]
            encoded = Encoded(known.ids[:cut] + rest.ids, starts, ends)
        else:
            encoded = self._piece(text)
        self.last = text, encoded
        return encoded

    def ids(self, text: str, spans: Sequence[Span] = ()) -> list[int]:
        """The tokens of a text whose places are of no interest."""
        return self(text, spans).ids if spans else list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def behind(self, text: str) -> list[int]:
        """The tokens of a text that follows another: without the space that some tokenizers put before a first word."""
        return self._behind(text, plain=False).ids

    def _behind(self, text: str, *, plain: bool) -> Encoded:
        num, piece = len(self.newline), self._first("\n" + text, plain=plain)
        if piece.ids[:num] != self.newline:
            return self._first(text, plain=plain)
        return Encoded(piece.ids[num:], [s - 1 for s in piece.starts[num:]], [e - 1 for e in piece.ends[num:]])

    def _first(self, text: str, *, plain: bool) -> Encoded:
        return self._plain(text) if plain else self._piece(text)

    def _piece(self, text: str) -> Encoded:
        if not self.tokenizer.is_fast:
            ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
            return Encoded(ids, [0] * len(ids), [len(text)] * len(ids))
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = zip(*found.offset_mapping, strict=True) if found.offset_mapping else ((), ())
        return Encoded(list(found.input_ids), starts, ends)

    def _plain(self, text: str) -> Encoded:
        """The tokens of a text without any control token among them."""
        control = {self.controls.ids[each] for each in self.controls.texts}
        for ids in self._ways(text):
            if control.isdisjoint(ids):
                return Encoded(ids, [0] * len(ids), [len(text)] * len(ids))
        raise Rejected(Reason.SPELLS_CONTROL, repr(text.strip()))

    def _ways(self, text: str) -> Any:
        """Ways to encode a text as text: by the tokenizer's own model without added tokens, then letter by letter."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
            words = (
                [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]
                if backend.pre_tokenizer
                else [normal]
            )
            yield [token.id for word in words for token in backend.model.tokenize(word)]
        else:
            yield list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)
        letters = [self._piece(letter).ids for letter in text]
        yield [i for ids in letters for i in ids]

    def _by_prefixes(self, text: str, spans: Sequence[Span], borders: Sequence[int]) -> Encoded:
        """The tokens of a slow tokenizer, which tells no places: those before a border are what the tokens of the text
        up to there begin with too."""
        ids = self._joined(text, spans)
        starts, ends = [0] * len(ids), [len(text)] * len(ids)
        for border in borders:
            before = self._joined(text[:border], [(a, min(b, border)) for a, b in spans if a < border])
            num = common_start(before, ids)
            starts[num:] = [border] * (len(ids) - num)
            ends[:num] = [min(end, border) for end in ends[:num]]
        return Encoded(ids, starts, ends)

    def _joined(self, text: str, spans: Sequence[Span]) -> list[int]:
        ids: list[int] = []
        for start, stop, plain in _pieces(text, spans):
            part = text[start:stop]
            ids += (self._behind(part, plain=plain) if start else self._first(part, plain=plain)).ids
        return ids


def _num_same(first: str, second: str) -> int:
    """How many letters two texts have in common before they part."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _has_unknown(backend: Any) -> bool:
    """Whether the model of a tokenizer gives a token of its own to what it has no token for."""
    if backend is None:
        return True
    return type(backend.model).__name__ == "Unigram" or getattr(backend.model, "unk_token", None) is not None


def _cut(span: Span, places: Sequence[int]) -> list[Span]:
    """A span, cut at the places within it."""
    edges = [span[0], *(place for place in places if span[0] < place < span[1]), span[1]]
    return list(itertools.pairwise(edges))


def _pieces(text: str, spans: Sequence[Span]) -> list[tuple[int, int, bool]]:
    """(start, stop, whether it is one of the spans) of the pieces that spans cut a text into."""
    pieces, place = [], 0
    for start, stop in spans:
        pieces += [(place, start, False), (start, stop, True)]
        place = stop
    return [piece for piece in (*pieces, (place, len(text), False)) if piece[0] < piece[1]]
