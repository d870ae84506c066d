"""Settings of the commands on data files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrlhf.errors import UserError
from fastrlhf.settings.training import REQUIRED, at_least, check_template_kwargs, choose, option, within
from fastrlhf.settings.values import convert_all

FORMATS = ("gsm8k", "helpsteer", "oasst", "pku-saferlhf", "sharegpt", "tldr", "ultrafeedback", "webgpt")


def _converted(config: Any) -> None:
    convert_all(config)
    within(config, 0, 1, "max_rejected")


@dataclass(frozen=True, kw_only=True)
class DataConvertConfig:
    """Another format's file as rows of ours."""

    file: str = option(REQUIRED, "as it is distributed: .jsonl, .json (both also .gz) or .parquet", positional=True)
    out: str = option(REQUIRED, "the file to write: .jsonl or .jsonl.gz", positional=True)
    format: str = option(REQUIRED, ", ".join(FORMATS))
    ties: str = option("keep", "keep: as preference 0.5, or as equal ranks; reject: leave them out")
    soft_labels: bool = option(False, "tldr, webgpt: how sure a rater was becomes the preference")
    score: str = option("overall", "ultrafeedback: ranked by overall, mean (of the aspects) or one aspect")
    ratings: bool = option(False, "ultrafeedback: a row a response with its ratings, in place of rankings")
    max_rejected: float = option(0.01, "fail if a larger share is rejected (what is left out by an option is not)")
    overwrite: bool = option(False, "replace OUT if it is there")

    def __post_init__(self) -> None:
        _converted(self)
        choose(self, "format", FORMATS)
        choose(self, "ties", ("keep", "reject"))
        if not self.out.endswith((".jsonl", ".jsonl.gz")):
            raise UserError(f"out must end in .jsonl or .jsonl.gz, got {self.out!r}")
        if Path(self.out).resolve() == Path(self.file).resolve():
            raise UserError(f"out must not be the file that is read, {self.file!r}")
        takers = {"soft_labels": ("tldr", "webgpt"), "score": ("ultrafeedback",), "ratings": ("ultrafeedback",)}
        for name, formats in takers.items():
            if getattr(self, name) not in (False, "overall") and self.format not in formats:
                raise UserError(f"{name} has no effect on format {self.format}; it is for {', '.join(formats)}")
        if self.ratings and self.score != "overall":
            raise UserError("give ratings or score, not both: with ratings every rating is kept")


@dataclass(frozen=True, kw_only=True)
class DataCheckConfig:
    """What a file holds, and what in it may harm a training."""

    file: str = option(REQUIRED, ".jsonl, .json (both also .gz) or .parquet", positional=True)
    tokenizer: str | None = option(None, "folder or hub id of a model: lengths in its tokens (default: characters)")
    max_length: int | None = option(None, "longer rows are rejected, as by the loops")
    against: str | None = option(None, "another file: the prompts that both hold, say of training and held-out rows")
    template: str = option("auto", "chat template: auto (if the tokenizer has one), chat or none (plain text)")
    template_kwargs: Mapping[str, Any] | None = option(None, "what the template gets: '{enable_thinking: false}'")
    max_rejected: float = option(0.01, "fail, with status 1, if a larger share of the rows is rejected")

    def __post_init__(self) -> None:
        _converted(self)
        choose(self, "template", ("auto", "chat", "none"))
        check_template_kwargs(self)
        at_least(self, 2, "max_length")
        if self.max_length and not self.tokenizer:
            raise UserError("max_length is in tokens: give tokenizer too")
