"""Settings of the commands on data files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrlhf.settings.base import Settings
from fastrlhf.settings.option import REQUIRED, option, reads
from fastrlhf.settings.training import TEMPLATES

FORMATS = ("gsm8k", "helpsteer", "oasst", "pku-saferlhf", "sharegpt", "tldr", "ultrafeedback", "webgpt")


@dataclass(frozen=True, kw_only=True)
class DataConvertConfig(Settings):
    """Another format's file as rows of ours."""

    file: str = reads(REQUIRED, "as it is distributed: .jsonl, .json (both also .gz) or .parquet", positional=True)
    out: str = option(REQUIRED, "the file to write: .jsonl or .jsonl.gz", path="output", positional=True)
    format: str = option(REQUIRED, ", ".join(FORMATS), choices=FORMATS)
    ties: str = option("keep", "keep: as preference 0.5, or equal ranks; reject: leave them out", choices="keep reject")
    soft_labels: bool = option(False, "tldr, webgpt: how sure a rater was becomes the preference")
    score: str = option("overall", "ultrafeedback: ranked by overall, mean (of the aspects) or one aspect")
    ratings: bool = option(False, "ultrafeedback: a row a response with its ratings, in place of rankings")
    max_rejected: float = option(
        0.01, "fail if a larger share is rejected (what is left out by an option is not)", between=(0, 1)
    )
    overwrite: bool = option(False, "replace OUT if it is there")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if not self.out.endswith((".jsonl", ".jsonl.gz")):
            yield f"out must end in .jsonl or .jsonl.gz, got {self.out!r}"
        if Path(self.out).resolve() == Path(self.file).resolve():
            yield f"out must not be the file that is read, {self.file!r}"
        if self.format == "ultrafeedback" and self.ratings and self.score != "overall":
            yield "give ratings or score, not both: with ratings every rating is kept"

    def unused(self) -> Iterator[tuple[str, str]]:
        yield from super().unused()
        for names, formats in (("soft_labels", ("tldr", "webgpt")), ("score ratings", ("ultrafeedback",))):
            if self.format not in formats:
                yield names, f" has no effect on format {self.format}; it is for {', '.join(formats)}"


@dataclass(frozen=True, kw_only=True)
class DataCheckConfig(Settings):
    """What a file holds, and what in it may harm a training."""

    file: str = reads(REQUIRED, ".jsonl, .json (both also .gz) or .parquet", positional=True)
    tokenizer: str | None = reads(None, "folder or hub id of a model: lengths in its tokens (default: characters)")
    max_length: int | None = option(None, "longer rows are rejected, as by the loops", at_least=2)
    against: str | None = reads(None, "another file: the prompts that both hold, say of training and held-out rows")
    template: str = option("auto", "chat template: auto (if the tokenizer has one), chat or none", choices=TEMPLATES)
    template_kwargs: Mapping[str, Any] | None = option(None, "what the template gets: '{enable_thinking: false}'")
    max_rejected: float = option(0.01, "fail, with status 1, if a larger share of the rows is rejected", between=(0, 1))

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.max_length and not self.tokenizer:
            yield "max_length is in tokens: give tokenizer too"
