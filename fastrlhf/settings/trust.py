"""Settings of the trust report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastrlhf.settings.option import REQUIRED, option, rare, reads
from fastrlhf.settings.training import ScoringConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateRewardConfig(ScoringConfig):
    """How far a reward model can be trusted: accuracy, calibration, length, labels, probes, as a page and as JSON."""

    model: str = reads(REQUIRED, "reward model FOLDER[,FOLDER...], module:function or URL; several are an ensemble")
    data: str = reads(REQUIRED, "held-out preference pairs (layouts: docs/data.md)")
    output: str = option(REQUIRED, "folder of report.html, summary.json, scores.jsonl", path="output", resume="free")
    by: str = option("split,rater,head", "columns of the data by which accuracy is told apart, those that it has")
    benchmark: str | None = reads(None, "pairs with a column subset and perhaps section, scored as RewardBench does")
    sycophancy: str | None = reads(None, "questions with and without the user's opinion (layout: docs/trust.md)")
    reference_data: str | None = reads(None, "file to compare the prompts with, say the training data")
    tokenizer: str | None = reads(None, "folder or hub id; default: that of the first model")
    limit: int | None = option(None, "use only so many rows of each file", at_least=1)
    max_length: int = option(1024, "pairs with a longer side are rejected", at_least=2)
    plots: bool = option(True, "plots on the page; they need matplotlib")
    overwrite: bool = option(False, "replace an earlier report in the output folder", resume="free")
    rater_column: str = rare("rater", "column of the data that names who labelled a pair")
    subset_column: str = rare("subset", "column of the benchmark that names a pair's subset")
    section_column: str = rare("section", "column of the benchmark that names the section of the subset")
    num_bins: int = rare(10, "bins of the reliability curve; other bins are half as many", at_least=2)

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if not all(self.models):
            yield f"model: no model between two commas in {self.model!r}"
        if len(set(self.models)) < len(self.models):
            yield f"model: {self.model!r} names a model twice"

    @property
    def models(self) -> list[str]:
        """The source of each model."""
        return [source.strip() for source in self.model.split(",")]

    @property
    def columns(self) -> list[str]:
        """The names of the columns by which accuracy is told apart."""
        return [name.strip() for name in self.by.split(",") if name.strip()]
