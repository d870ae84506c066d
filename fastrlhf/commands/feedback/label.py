"""`fastrlhf label`: pairs of responses, labelled by a judge from a written rubric.

<output>/answers.jsonl    what the policy answered, where it did
<output>/verdicts.jsonl   what the judge said of each pair, a line a pair; a resumed run goes on after its last batch
<output>/pairs.jsonl      preference rows: prompt, chosen, rejected, preference = P(chosen is better), rater
<output>/summary.json     counts, agreement with the labels of the file, position bias
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastrlhf.commands.feedback.judge import Verdict, judge_pairs
from fastrlhf.commands.feedback.judges import make_judge, make_question
from fastrlhf.commands.feedback.rows import (
    FeedbackRow,
    Row,
    as_prompt,
    as_text,
    check_rejection_rate,
    check_same_items,
    check_two,
    read_items,
    rejected_by_reason,
)
from fastrlhf.data import Reason, Rejected
from fastrlhf.data.template import Renderer, load_tokenizer
from fastrlhf.errors import DataError, UserError
from fastrlhf.evaluation.answers import answer
from fastrlhf.generation.engine import Sampling
from fastrlhf.models.policy import Policy
from fastrlhf.runtime.atomic_io import write_json
from fastrlhf.runtime.jsonl import append, read_jsonl, truncate_after_step, write_jsonl
from fastrlhf.runtime.metrics import MetricsLog
from fastrlhf.runtime.output_folder import OutputFolder
from fastrlhf.runtime.products import PRODUCTS, check_products, note_new
from fastrlhf.settings.feedback import LabelConfig
from fastrlhf.stats.accuracy import accuracy_of_hits

OURS = (
    "config.yaml",
    "inputs.json",
    PRODUCTS,
    "rows.crc32",
    "answers.jsonl",
    "verdicts.jsonl",
    "pairs.jsonl",
    "summary.json",
)


class Label:
    """Labels the pairs of a file; iterate over it to do so: it yields lines on how far it is and what came out.

    Raises: DataError for rows that cannot be used; ValueError, FileNotFoundError or ServerError for a judge that cannot
    be asked, before any work is done."""

    def __init__(self, config: LabelConfig) -> None:
        self.config, self.output = config, Path(config.output)
        self.folder = OutputFolder(config, OURS)
        if self.folder.is_resumed:
            check_products(self.output)
        self.question = make_question(config)
        if config.policy is None:
            self.items, self.report = read_items(config.data, limit=config.limit, bare=False)
            self.items = self.kept(self.items)
        else:
            self.tokenizer = load_tokenizer(config.policy)
            self.renderer = Renderer(self.tokenizer, config.template, config.template_kwargs)
            chat = self.renderer.chat
            self.items, self.report = read_items(config.data, limit=config.limit, bare=True, chat=chat)
        self.judge = make_judge(config)
        assert config.judge is not None
        self.rater = config.rater or config.judge_model or Path(config.judge).name
        self.folder.open()
        check_same_items(self.output / "rows.crc32", self.items)

    def __iter__(self) -> Iterator[str]:
        if self.config.policy is not None:
            self.items = self.kept(self.answered())
        verdicts = yield from self.verdicts()
        rows, summary = label(self.items, verdicts, rater=self.rater, tie_margin=self.config.tie_margin)
        summary = {"judge": self.rater, "rows": self.report.num_rows, **summary}
        summary["rejected"] = rejected_by_reason(self.report)
        write_jsonl(self.output / "pairs.jsonl", rows)
        write_json(self.output / "summary.json", summary)
        self.folder.close()
        yield str(self.report)
        yield describe(summary)
        if not rows:
            ties = f"all {summary['ties']} judged pairs are ties (tie_margin {self.config.tie_margin:g})"
            warnings.warn(f"label: pairs.jsonl is empty: {ties}; try another judge or rubric", stacklevel=2)

    def kept(self, items: Sequence[FeedbackRow]) -> list[FeedbackRow]:
        """The items with two different responses. Raises: DataError when too many have not."""
        kept = []
        for item in items:
            try:
                check_two(item)
                kept.append(item)
            except Rejected as rejected:
                drawn = self.config.policy is not None and rejected.reason == Reason.SAME
                self.report.reject(item.number, Reason.SAME_SAMPLES if drawn else rejected.reason, rejected.detail)
        check_rejection_rate(self.report, self.config.max_rejected)
        if not kept:
            raise DataError(f"data: no row can be used\n{self.report}")
        return kept

    def answered(self) -> list[FeedbackRow]:
        """The items with the policy's two responses to each, drawn now or earlier."""
        config, path, prompts, items = self.config, self.output / "answers.jsonl", [], []
        for item in self.items:
            try:
                prompts += [as_prompt(item, self.renderer, config.max_prompt_tokens)] * 2
                items.append(item)
            except Rejected as rejected:
                self.report.reject(item.number, rejected.reason, rejected.detail)
        check_rejection_rate(self.report, config.max_rejected)
        if not path.exists():
            assert config.policy is not None
            policy = Policy.from_pretrained(config.policy, freeze=True, **config.model_options())
            sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
            first = config.seed << 32
            with MetricsLog.progress("answer", len(prompts) * config.max_new_tokens) as done:
                seeds = range(first, first + len(prompts))
                given = answer(policy, self.tokenizer, prompts, {}, sampling=sampling, seeds=seeds, progress=done)
            ends = given.finished.tolist()
            rows = [{"responses": given.texts[n : n + 2], "finished": ends[n : n + 2]} for n in range(0, len(ends), 2)]
            write_jsonl(path, rows)
        answers = read_jsonl(path)
        if len(answers) != len(items) or not all({"responses", "finished"} <= row.keys() for row in answers):
            raise UserError(f"resume: {path} is damaged: it lacks answers; delete it to have it made again")
        note_new(self.output, path.name)
        both = zip(items, answers, strict=True)
        return [replace(item, responses=tuple(row["responses"]), finished=tuple(row["finished"])) for item, row in both]

    def verdicts(self) -> Generator[str, None, list[Verdict | None]]:
        """Asks about the pairs that have not been asked about; returns all verdicts, None for those rejected.

        Raises: DataError as soon as too many are."""
        config, path, size, pairs = self.config, self.output / "verdicts.jsonl", self.config.judge_batch, self.items
        truncate_after_step(path, len(pairs))  # to the last line that is whole
        if path.exists() and (num := path.read_bytes().count(b"\n")) < len(pairs):
            truncate_after_step(path, num // size)  # the last batch may not be whole
        rows = read_jsonl(path) if path.exists() else []
        for start in range(len(rows), len(pairs), size):
            batch = pairs[start : start + size]
            asked = [(as_text(item.prompt), item.responses[0].strip(), item.responses[1].strip()) for item in batch]
            with MetricsLog.progress("judge", len(batch)) as done:
                verdicts = judge_pairs(self.judge, self.question, asked, min_mass=config.min_mass, progress=done)
            self.folder.check()
            for item, verdict in zip(batch, verdicts, strict=True):
                rows.append({"step": start // size + 1, "row": item.number, **_as_row(verdict)})
                append(path, rows[-1], seal=True)
            num_rejected = self.report.num_faults + sum("reason" in row for row in rows)
            if num_rejected > config.max_rejected * self.report.num_rows:
                self.report.notes.append(f"the judge was asked about {len(rows)} of {len(pairs)} pairs until then")
                break
            yield f"{len(rows)} of {len(pairs)} pairs judged"
        for item, row in zip(pairs, rows, strict=False):  # not all are asked about where too many are rejected
            if "reason" in row:
                self.report.reject(item.number, Reason(row["reason"]), row["detail"])
        check_rejection_rate(self.report, config.max_rejected)
        if self.report.num_used == 0:
            raise DataError(f"label: no pair has a label\n{self.report}")
        return [None if "reason" in row else Verdict(tuple(row["orders"]), tuple(row["masses"])) for row in rows]


def _as_row(verdict: Verdict | Rejected) -> Row:
    if isinstance(verdict, Rejected):
        return {"reason": str(verdict.reason), "detail": verdict.detail}
    return {"orders": verdict.orders, "masses": verdict.masses}


def label(
    items: Sequence[FeedbackRow], verdicts: Sequence[Verdict | None], *, rater: str, tie_margin: float
) -> tuple[list[Row], Row]:
    """Returns a preference row for each pair with a verdict that is no tie, and a summary of all verdicts.

    A row has prompt, chosen and rejected, preference = P(chosen is better), orders = that when the chosen response was
    shown first and when it was shown second, rater, and the other columns of its item.
    tie_margin: a pair whose preference is no further from 1/2 is a tie"""
    rows, judged, num_ties, agreements = [], [], 0, []
    for item, verdict in zip(items, verdicts, strict=True):
        if verdict is None:
            continue
        judged.append(verdict)
        tie, first_wins = abs(verdict.preference - 0.5) <= tie_margin, verdict.preference > 0.5
        given = _given(item)
        if given != 0.5:
            agreements.append((0.5 if tie else float(first_wins == (given > 0.5)), as_text(item.prompt)))
        if tie:
            num_ties += 1
            continue
        better, worse = (0, 1) if first_wins else (1, 0)
        orders = verdict.orders if first_wins else (1 - verdict.orders[1], 1 - verdict.orders[0])
        rows.append(
            {
                "prompt": item.prompt,
                "chosen": item.responses[better],
                "rejected": item.responses[worse],
                "preference": max(verdict.preference, 1 - verdict.preference),
                "orders": orders,
                "rater": rater,
                **{f"{side}_finished": item.finished[n] for side, n in (("chosen", better), ("rejected", worse))},
                **item.columns,
                **({"agrees": first_wins == (given > 0.5)} if given != 0.5 else {}),
            }
        )
    return rows, {"pairs": len(rows), "ties": num_ties, **_summary(judged, agreements)}


def _given(item: FeedbackRow) -> float:
    """Returns the file's label of a pair, P(its first response is better); 1/2 if it has none."""
    value = item.label.get("preference")
    return 0.5 if not item.labelled else float(value) if isinstance(value, int | float) else 1.0


def _summary(judged: Sequence[Verdict], agreements: Sequence[tuple[float, str]]) -> Row:
    """What the verdicts came to: sureness, position bias, mass of the answers, agreement with the file's labels.

    agreements: of each pair that the file labels, 1, 0, or 1/2 for a tie, and its prompt"""
    num = len(judged)
    summary: Row = {
        "mean_preference": sum(max(each.preference, 1 - each.preference) for each in judged) / num,
        "order_decides": sum(each.order_decides for each in judged) / num,
        "order_decides_for_first": sum(each.order_decides and each.orders[0] > 0.5 for each in judged) / num,
        # over both orders: P that what is shown first is better, whatever it is
        "mean_first": sum(each.orders[0] + 1 - each.orders[1] for each in judged) / (2 * num),
        "least_mass": min(min(each.masses) for each in judged),
    }
    if agreements:
        hits, prompts = zip(*agreements, strict=True)
        found = accuracy_of_hits(torch.tensor(hits), prompts)
        summary["agreement"] = {"share": found.accuracy, "interval": (found.low, found.high)}
    return summary


def describe(summary: Row) -> str:
    """The summary in words."""
    text = (
        f"{summary['pairs']} pairs, {summary['ties']} ties; mean preference {summary['mean_preference']:.1%}: the "
        "judge's probability that the response it prefers is better\n"
        f"position: the order decides {summary['order_decides']:.1%} of the pairs (for the response shown first: "
        f"{summary['order_decides_for_first']:.1%}), and the response shown first has a mean preference of "
        f"{summary['mean_first']:.1%} (50 % without bias)"
    )
    if "agreement" in summary:
        low, high = summary["agreement"]["interval"]
        interval = f"95 % interval {low:.1%} to {high:.1%}"
        text += f"\nagreement with the labels of the file: {summary['agreement']['share']:.1%} ({interval})"
    return text
