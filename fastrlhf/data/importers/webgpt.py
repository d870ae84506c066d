"""WebGPT comparisons: two answers to a question, and by how much one was preferred.

Format: the card of openai/webgpt_comparisons: `question` (`full_text`, `dataset`, `id`), `answer_0`, `answer_1`,
`score_0` from -1 to 1, and `score_1` = -score_0. The paper (arXiv 2112.09332) takes the sign alone as the label, and a
score of 0 as one half. Its raters are not given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastrlhf.data.importers._parts import number_of, pair
from fastrlhf.data.report import Reason, Rejected
from fastrlhf.settings.data import DataConvertConfig

COLUMNS = (("question", "answer_0", "answer_1", "score_0", "score_1"),)


def convert(row: Mapping[str, Any], config: DataConvertConfig) -> Iterator[dict[str, Any]]:
    """Yields a pair; with soft_labels its preference is (1 + |score|) / 2."""
    first, second = (number_of(row[name], name) for name in ("score_0", "score_1"))
    if abs(first + second) > 1e-6 or abs(first) > 1:
        raise Rejected(Reason.BAD_LABEL, f"score_0 is {first} and score_1 is {second}")
    question = row["question"] if isinstance(row["question"], Mapping) else {}
    made = pair(question.get("full_text"), (row["answer_0"], row["answer_1"]), second, config)
    if config.soft_labels:
        made["preference"] = (1 + abs(first)) / 2
    yield {**made, "source": question.get("dataset")}
