"""`fastrlhf data check`: what a file holds, how it will be read, and what in it may harm a training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastrlhf.data.characters import CharacterTokenizer
from fastrlhf.data.controls import LOOKS, texts_in
from fastrlhf.data.files import read_rows
from fastrlhf.data.importers import IMPORTERS
from fastrlhf.data.items import Item, Tokens, item_of
from fastrlhf.data.judged import LAYOUTS as JUDGED
from fastrlhf.data.judged import load_labelled, load_pairs, load_rankings, load_ratings
from fastrlhf.data.loading import (
    DEMONSTRATION_COLUMNS,
    PROMPT_COLUMNS,
    Columns,
    Loaded,
    load_demonstrations,
    load_prompts,
)
from fastrlhf.data.statistics import chosen_is_longer, digest, percentiles, repetitions, shared_prompts
from fastrlhf.data.template import Renderer, load_tokenizer
from fastrlhf.errors import DataError
from fastrlhf.settings.data import DataCheckConfig

TEXTS = ("prompt", "completion", "messages", "chosen", "rejected", "responses", "text")  # columns of texts
SHARES = (0, 50, 90, 99, 100)


@dataclass(frozen=True)
class Layout:
    """name: of what its rows are; columns: what they have, one of these; load: its loader"""

    name: str
    columns: tuple[Columns, ...]
    load: Callable[..., Loaded[Any]]


def _prompts(path: str, tokenizer: Any, *, max_tokens: int, **options: Any) -> Loaded[Any]:
    return load_prompts(path, tokenizer, max_prompt_tokens=max_tokens, **options)


LAYOUTS = (  # of those that a file's columns allow, the first
    Layout("rankings", JUDGED["rankings"], load_rankings),
    Layout("rated responses", JUDGED["ratings"], load_ratings),
    Layout("labelled responses", JUDGED["labelled"], load_labelled),
    Layout("preference pairs", JUDGED["pairs"], load_pairs),
    Layout("demonstrations", DEMONSTRATION_COLUMNS, load_demonstrations),
    Layout("prompts", PROMPT_COLUMNS, _prompts),
)
READERS = {
    "sft": DEMONSTRATION_COLUMNS,
    "reward": tuple(columns for accepted in JUDGED.values() for columns in accepted),
    "dpo": (*JUDGED["pairs"], *JUDGED["labelled"]),
    "ppo": PROMPT_COLUMNS,
}


def check(config: DataCheckConfig) -> Iterator[str]:
    """Yields the report on config.file.

    Raises: DataError for a file of no known layout, and at the end where more than config.max_rejected of its rows are
    rejected."""
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else CharacterTokenizer()
    count = tokenizer.count if isinstance(tokenizer, CharacterTokenizer) else len
    layout = _layout(config.file)
    yield from _hint(config.file)
    loaded = _load(config, config.file, layout, tokenizer)
    items = [item_of(row) for row in loaded.rows]
    yield f"{layout.name}, for fastrlhf {', '.join(_readers(config.file))}\n{loaded.report}"
    yield "\n".join(_lengths(items, count, "characters" if isinstance(tokenizer, CharacterTokenizer) else "tokens"))
    yield "\n".join([*_contents(items, count), *_spelled(config, tokenizer)])
    if config.against:
        yield _overlap(items, config, tokenizer)
    rejected, rows = loaded.report.num_rejected, loaded.report.num_rows
    if rejected > config.max_rejected * rows:
        raise DataError(f"data: {rejected} of {rows} rows rejected, more than max_rejected = {config.max_rejected:g}")


def _layout(path: str) -> Layout:
    columns = _columns(path)
    for layout in LAYOUTS:
        if any(columns >= set(needed) for needed in layout.columns):
            return layout
    layouts = "; ".join(f"{layout.name} have {' or '.join(map(' + '.join, layout.columns))}" for layout in LAYOUTS)
    hint = "".join("\n" + line for line in _hint(path))
    raise DataError(f"data: {path} has the columns {', '.join(sorted(columns)) or '(none)'}; {layouts}{hint}")


def _hint(path: str) -> list[str]:
    """A line where the columns are those of another format."""
    columns = _columns(path)
    formats = [name for name, form in IMPORTERS.items() if any(columns >= set(needed) for needed in form.columns)]
    return [
        f"these are the columns of format {name}: fastrlhf data convert {path} OUT --format {name}" for name in formats
    ]


def _readers(path: str) -> list[str]:
    columns = _columns(path)
    return [name for name, layouts in READERS.items() if any(columns >= set(needed) for needed in layouts)]


def _columns(path: str) -> set[str]:
    """Those of the first row."""
    first = next(read_rows(path), None)
    if first is None:
        raise DataError(f"data: {path} has no rows")
    return set(first[1])


def _load(config: DataCheckConfig, path: str, layout: Layout, tokenizer: Any) -> Loaded[Any]:
    longest = config.max_length or 2**62
    options = {"template": config.template, "template_kwargs": config.template_kwargs, "max_rejected": 1}
    return layout.load(path, tokenizer, max_tokens=longest, **options)


def _lengths(items: Sequence[Item], count: Callable[[Tokens], int], unit: str) -> list[str]:
    prompts = [count(item.prompt) for item in items]
    responses = [[count(response) for response in item.responses] for item in items]
    kinds = {
        "prompts": prompts if any(prompts) else [],
        "responses": [length for lengths in responses for length in lengths],
        "together": [p + max(lengths) for p, lengths in zip(prompts, responses, strict=True) if lengths and p],
    }
    lines = [
        f"{'length in ' + unit:<24}" + "".join(f"{title:>9}" for title in ("least", "50 %", "90 %", "99 %", "most"))
    ]
    for name, lengths in kinds.items():
        if lengths:
            lines.append(f"  {name:<22}" + "".join(f"{length:>9}" for length in percentiles(lengths, SHARES)))
    return lines


def _contents(items: Sequence[Item], count: Callable[[Tokens], int]) -> list[str]:
    found = repetitions(items)
    lines = [f"rows that repeat an earlier row: {found.rows}"]
    if any(item.prompt for item in items):
        lines.append(f"rows that repeat an earlier prompt: {found.prompts}")
    if any(item.ranks for item in items):
        lines.append(f"pairs labelled both ways: {found.contradictions}")
        longer, same = chosen_is_longer(items, count)
        lines.append(f"the better response is the longer one: {longer:.1%} of pairs (as long: {same:.1%})")
    elif any(item.label is not None for item in items):
        lines.append(f"responses with several labels: {found.contradictions}")
        lines += _labels(items)
    if any(item.prompt and item.responses for item in items):
        prompts, spared = shared_prompts(items, count)
        of = "of a row" if len(items[0].responses) > 1 else "to one prompt"
        lines.append(
            f"prompts are {prompts:.1%} of what is read; reading it once for all responses {of} saves {spared:.1%}"
        )
    for name in ("rater", "head", "split"):
        values = [str(item.columns[name]) for item in items if item.columns.get(name) is not None]
        if values:
            lines.append(_counts(name, values))
    return lines


def _spelled(config: DataCheckConfig, tokenizer: Any) -> list[str]:
    """Lines on what looks like control tokens in the texts of the file, if anything does, and how it is read."""
    find: Callable[[str], list[str]] = re.compile(LOOKS).findall
    chat = config.template != "none"
    if not isinstance(tokenizer, CharacterTokenizer):
        renderer = Renderer(tokenizer, config.template, config.template_kwargs)
        find, chat = renderer.controls.spelled, renderer.chat
    read = [*_read(config.file), *(["tools"] if chat else [])]
    ways = {"read as control tokens, without a chat template": [] if chat else read}
    if chat:
        ways["read as text with a chat template"] = [name for name in read if name != "text"]
        ways["read as control tokens: a column text does not pass the chat template"] = [n for n in read if n == "text"]
    lines = []
    for how, names in ways.items():
        found: Counter[str] = Counter()
        rows = 0
        for _, row in read_rows(config.file) if names else ():
            spelled = [match for name in names if name in row for text in texts_in(row[name]) for match in find(text)]
            found.update(spelled)
            rows += bool(spelled)
        most = ", ".join(f"{text}: {number}" for text, number in found.most_common(5))
        if found:
            lines.append(f"texts that look like control tokens: {found.total()} in {rows} rows ({most}), {how}")
    return lines


def _read(path: str) -> list[str]:
    """The columns of texts that some command reads."""
    columns = _columns(path)
    fits = [next((c for c in layouts if columns >= set(c)), ()) for layouts in READERS.values()]
    return [name for name in TEXTS if any(name in used for used in fits)]


def _labels(items: Sequence[Item]) -> list[str]:
    """How often each label occurs; of ratings, the mean of each attribute."""
    if not isinstance(items[0].label, tuple):
        return [_counts("label", (f"{item.label:g}" for item in items))]
    ratings: dict[str, list[float]] = {}
    for item in items:
        for name, value in item.label:
            ratings.setdefault(name, []).append(value)
    return [f"{name}: mean {sum(each) / len(each):.3g} of {len(each)}" for name, each in ratings.items()]


def _counts(name: str, values: Iterable[str]) -> str:
    """How many values there are, and the most frequent ones."""
    counts = Counter(sorted(values))
    most = ", ".join(f"{value}: {number}" for value, number in counts.most_common(5))
    return f"{name}: {len(counts)} ({most}{', ...' if len(counts) > 5 else ''})"


def _overlap(items: Sequence[Item], config: DataCheckConfig, tokenizer: Any) -> str:
    other = _layout(config.against or "")
    rows = _load(config, config.against or "", other, tokenizer).rows
    there = {digest(item_of(row).prompt) for row in rows}
    both = [digest(item.prompt) for item in items if item.prompt and digest(item.prompt) in there]
    return f"prompts that {config.against} holds too: {len(set(both))} (in {len(both)} rows here)"
