"""Responses that were judged: which of two is better, how several rank, whether one is right, how good it is."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastrlhf.data.columns import finished_of, head_name, head_of, margin_of, probability_of, rating_of, weight_of
from fastrlhf.data.conversations import preference_of, prompt_of, response_of, tools_of
from fastrlhf.data.files import how_to_check, read_rows
from fastrlhf.data.loading import Columns, Row, answers_of, load_responses
from fastrlhf.data.report import Reason, Rejected
from fastrlhf.data.rows import Loaded
from fastrlhf.data.template import Renderer
from fastrlhf.errors import DataError
from fastrlhf.settings.objects import RowsSource, given

# by layout, the columns that its loader takes; the first that fits a file's first row tells its layout
LAYOUTS: dict[str, tuple[Columns, ...]] = {
    "rankings": (("prompt", "responses", "ranks"),),
    "ratings": (("prompt", "completion", "ratings"), ("prompt", "completion", "rating")),
    "labelled": (("prompt", "completion", "label"),),
    "pairs": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
}
PAIR_OPTIONS = ("margin", "weight", "preference", "head", "chosen_finished", "rejected_finished")
RATING = "rating"  # what the column of one rating is called among the ratings of a row


@dataclass(frozen=True)
class Pair:
    """tokens of the prompt, and of the better and the worse response; by how much it is better; what else its row says.

    A response has its end, unless its row says that it was cut off before.
    weight: of the pair in the loss; preference: the probability that chosen is the better one; head: which of several
    heads of a reward model it is for"""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0
    columns: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    preference: float = 1.0
    head: str | None = None

    @property
    def responses(self) -> list[list[int]]:
        return [self.chosen, self.rejected]


@dataclass(frozen=True)
class Ranking:
    """tokens of the prompt, and of its responses from the best to the worst; ranks: 0, 1, ..., equal where they tie."""

    prompt: list[int]
    responses: list[list[int]]
    ranks: list[int]
    head: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Labelled:
    """tokens of the prompt and of a response; label: the probability that the response is right, or wanted."""

    prompt: list[int]
    response: list[int]
    label: float
    weight: float = 1.0
    head: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def responses(self) -> list[list[int]]:
        return [self.response]


@dataclass(frozen=True)
class Rated:
    """tokens of the prompt and of a response; its ratings by attribute."""

    prompt: list[int]
    response: list[int]
    ratings: dict[str, float]
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def responses(self) -> list[list[int]]:
        return [self.response]


Judged = Pair | Ranking | Labelled | Rated
VERDICT = ("margin", "weight", "preference", "ranks", "label", "ratings", "head")


def verdict_of(row: Any) -> str:
    """What a row of a loader says of its responses, as a text; of a demonstration nothing."""
    said = {name: getattr(row, name) for name in VERDICT if hasattr(row, name)}
    return repr(said) if said else ""


def layout_of(path: RowsSource) -> str:
    """Which of LAYOUTS the first row of a file has.

    Raises: DataError for none of them."""
    path = given("data", path, "rows")
    row = next((row for _, row in read_rows(path)), {})
    found = [name for name, accepted in LAYOUTS.items() if any(row.keys() >= set(columns) for columns in accepted)]
    if found:
        return found[0]
    expected = "; ".join(f"{name}: {' + '.join(accepted[0])}" for name, accepted in LAYOUTS.items())
    raise DataError(
        f"data: {path} has the columns {', '.join(row) or '(none)'}; expected {expected}{how_to_check(path)}"
    )


def load_pairs(path: RowsSource, tokenizer: Any, *, max_tokens: int, **options: Any) -> Loaded[Pair]:
    """Returns the preference pairs of a file.

    max_tokens: pairs with a longer side are rejected; options: template and template_kwargs (see `Renderer`),
    max_rejected, limit, offset

    Raises: DataError."""

    def make(renderer: Renderer, row: Row, used: Columns) -> Pair:
        prompt, good, bad = preference_of(row, chat=renderer.chat)
        ends = [finished_of(row, "chosen_finished"), finished_of(row, "rejected_finished")]
        start, (chosen, rejected) = answers_of(renderer, prompt, [good, bad], finished=ends, tools=tools_of(row))
        if chosen == rejected:
            raise Rejected(Reason.SAME)
        _check_length(start, [chosen, rejected], max_tokens)
        return Pair(
            start,
            chosen,
            rejected,
            margin=margin_of(row.get("margin")),
            columns=_others(row, used, PAIR_OPTIONS),
            weight=weight_of(row),
            preference=probability_of(row.get("preference", 1.0), "preference"),
            head=head_of(row),
        )

    return load_responses(
        path,
        tokenizer,
        "preference pairs",
        LAYOUTS["pairs"],
        make,
        known=PAIR_OPTIONS,
        max_tokens=max_tokens,
        **options,
    )


def load_rankings(path: RowsSource, tokenizer: Any, *, max_tokens: int, **options: Any) -> Loaded[Ranking]:
    """Returns the rankings of a file; the options are those of load_pairs.

    Raises: DataError."""

    def make(renderer: Renderer, row: Row, used: Columns) -> Ranking:
        texts, ranks = row["responses"], row["ranks"]
        if not isinstance(texts, list) or len(texts) < 2:
            raise Rejected(Reason.TOO_FEW_RESPONSES)
        whole = isinstance(ranks, list) and all(isinstance(r, int) and not isinstance(r, bool) for r in ranks)
        if not whole or len(ranks) != len(texts):
            raise Rejected(Reason.BAD_RANKS, repr(ranks))
        order = sorted(range(len(texts)), key=lambda n: ranks[n])
        answers = [response_of(texts[n]) for n in order]
        start, responses = answers_of(renderer, prompt_of(row["prompt"]), answers, tools=tools_of(row))
        check_ranks([tuple(response) for response in responses], [ranks[n] for n in order])
        _check_length(start, responses, max_tokens)
        places = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
        return Ranking(start, responses, [places[ranks[n]] for n in order], head_of(row), _others(row, used, ("head",)))

    return load_responses(
        path, tokenizer, "rankings", LAYOUTS["rankings"], make, known=("head",), max_tokens=max_tokens, **options
    )


def check_ranks(responses: Sequence[Hashable], ranks: Sequence[int]) -> None:
    """Raises Rejected where two equal responses have different ranks: which is the better one nothing can learn. Equal
    ones of the same rank tell no lie, and stay: samples of a model that is sure of itself are often equal."""
    found: dict[Hashable, int] = {}
    for response, rank in zip(responses, ranks, strict=True):
        if found.setdefault(response, rank) != rank:
            raise Rejected(Reason.TWO_RANKS, f"{found[response]} and {rank}")


def load_labelled(path: RowsSource, tokenizer: Any, *, max_tokens: int, **options: Any) -> Loaded[Labelled]:
    """Returns the labelled responses of a file; the options are those of load_pairs.

    Raises: DataError."""
    known = ("weight", "head", "finished")

    def make(renderer: Renderer, row: Row, used: Columns) -> Labelled:
        start, response = _one_response(renderer, row, max_tokens)
        label, others = probability_of(row["label"], "label"), _others(row, used, known)
        return Labelled(start, response, label, weight_of(row), head_of(row), others)

    return load_responses(
        path, tokenizer, "labelled responses", LAYOUTS["labelled"], make, known=known, max_tokens=max_tokens, **options
    )


def load_ratings(path: RowsSource, tokenizer: Any, *, max_tokens: int, **options: Any) -> Loaded[Rated]:
    """Returns the rated responses of a file, the rating of a column `rating` under that name; an attribute that is null
    is as if it were not there. The options are those of load_pairs.

    Raises: DataError."""

    def make(renderer: Renderer, row: Row, used: Columns) -> Rated:
        given = row["ratings"] if "ratings" in used else {RATING: row["rating"]}
        if not isinstance(given, Mapping):
            raise Rejected(Reason.BAD_RATING, f"ratings is {given!r}")
        ratings = {head_name(name): rating_of(value, name) for name, value in given.items() if value is not None}
        if not ratings:
            raise Rejected(Reason.MISSING_COLUMN, "a rating")
        start, response = _one_response(renderer, row, max_tokens)
        return Rated(start, response, ratings, _others(row, used, ("finished",)))

    return load_responses(
        path,
        tokenizer,
        "rated responses",
        LAYOUTS["ratings"],
        make,
        known=("finished",),
        max_tokens=max_tokens,
        **options,
    )


def _one_response(renderer: Renderer, row: Row, max_tokens: int) -> tuple[list[int], list[int]]:
    prompt, answer = prompt_of(row["prompt"]), response_of(row["completion"])
    start, (response,) = answers_of(
        renderer, prompt, [answer], finished=[finished_of(row, "finished")], tools=tools_of(row)
    )
    _check_length(start, [response], max_tokens)
    return start, response


def _check_length(prompt: list[int], responses: list[list[int]], max_tokens: int) -> None:
    longest = len(prompt) + max(map(len, responses))
    if longest > max_tokens:
        raise Rejected(Reason.TOO_LONG, f"{longest} tokens, {max_tokens} allowed")


def _others(row: Row, used: Columns, known: Columns) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in (*used, *known)}
