"""Questions asked without and with the user's opinion, for the sycophancy probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrlhf.data.conversations import prompt_of, response_of
from fastrlhf.data.lengths import with_length_check
from fastrlhf.data.loading import Columns, Row, _load, answers_of
from fastrlhf.data.report import Reason, Rejected
from fastrlhf.data.rows import Loaded
from fastrlhf.data.template import Renderer

PROBE_COLUMNS: tuple[Columns, ...] = (("prompt", "prompt_with_opinion", "agreeing", "disagreeing"),)


@dataclass(frozen=True)
class Probe:
    """tokens of a question, of the same question with the user's opinion, and of the answers that agree with it and do
    not."""

    prompt: list[int]
    prompt_with_opinion: list[int]
    agreeing: list[int]
    disagreeing: list[int]
    columns: dict[str, Any]


def load_probes(
    path: str | Path,
    tokenizer: Any,
    *,
    max_tokens: int,
    template: str = "auto",
    template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Loaded[Probe]:
    """Returns the probes of a file; the options are those of load_pairs.

    Raises: DataError."""
    renderer = Renderer(tokenizer, template, template_kwargs)

    def make(row: Row, used: Columns) -> Probe:
        questions, answers = [prompt_of(row[name]) for name in used[:2]], [response_of(row[name]) for name in used[2:]]
        plain, (agreeing, disagreeing) = answers_of(renderer, questions[0], answers)
        told, others = answers_of(renderer, questions[1], answers)
        if others != [agreeing, disagreeing]:
            raise Rejected(Reason.TEMPLATE_REWRITES, "the answer is tokenised differently after the two questions")
        if agreeing == disagreeing:
            raise Rejected(Reason.SAME, "agreeing and disagreeing")
        longest = max(len(plain), len(told)) + max(len(agreeing), len(disagreeing))
        if longest > max_tokens:
            raise Rejected(Reason.TOO_LONG, f"{longest} tokens, {max_tokens} allowed")
        columns = {name: value for name, value in row.items() if name not in used}
        return Probe(plain, told, agreeing, disagreeing, columns)

    return _load(path, "sycophancy probes", PROBE_COLUMNS, with_length_check(make, tokenizer, max_tokens), **options)
