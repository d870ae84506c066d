"""`fastrlhf revise`: a model criticises its own responses by principles and revises them.

<output>/responses.jsonl        the first responses, where the data has none
<output>/round-1.jsonl, ...     principle, critique and revision of each response, or why there is none
<output>/demonstrations.jsonl   prompt, completion = the last revision
<output>/pairs.jsonl            prompt, chosen = the last revision, rejected = the first response (pairs)
<output>/transcripts.jsonl      everything in between, to be read
<output>/summary.json
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from fastrlhf.commands.feedback.constitution import STOPS, ask_critique, ask_revision, draw, load_principles
from fastrlhf.commands.feedback.rows import (
    FeedbackRow,
    Row,
    as_prompt,
    check_rejection_rate,
    check_same_items,
    read_items,
    rejected_by_reason,
)
from fastrlhf.data import Reason, Rejected
from fastrlhf.data.conversations import Conversation
from fastrlhf.data.template import Renderer, eos_token_ids, load_tokenizer
from fastrlhf.errors import DataError, UserError
from fastrlhf.generation.engine import Engine, Sampling
from fastrlhf.models.policy import Policy, autocasting
from fastrlhf.runtime.atomic_io import write_json
from fastrlhf.runtime.jsonl import read_jsonl, write_jsonl
from fastrlhf.runtime.metrics import MetricsLog
from fastrlhf.runtime.output_folder import OutputFolder
from fastrlhf.runtime.products import PRODUCTS, check_products, note_new
from fastrlhf.settings.feedback import MAX_ROUNDS, ReviseConfig

TABLES = ("responses.jsonl", "demonstrations.jsonl", "pairs.jsonl", "transcripts.jsonl")
OURS = ("config.yaml", "inputs.json", PRODUCTS, "rows.crc32", *TABLES, "summary.json")


class Revise:
    """Revises the responses to a file's prompts; iterate over it to do so: it yields lines on how far it is.

    What a round wrote is whole or not there, so a run that was stopped goes on with the round that it was in.

    Raises: DataError for rows that cannot be used; ValueError or FileNotFoundError for a model or principles that are
    none, before any work is done."""

    def __init__(self, config: ReviseConfig) -> None:
        self.config, self.output = config, Path(config.output)
        rounds = (f"round-{number}.jsonl" for number in range(1, MAX_ROUNDS + 1))
        self.folder = OutputFolder(config, (*OURS, *rounds))
        if self.folder.is_resumed:
            check_products(self.output)
        self.principles = load_principles(config.principles)
        self.tokenizer = load_tokenizer(config.model)
        self.renderer = Renderer(self.tokenizer, config.template, config.template_kwargs)
        chat = self.renderer.chat
        items, self.report = read_items(config.data, limit=config.limit, bare=not config.given, chat=chat)
        self.items: dict[int, FeedbackRow] = {}
        for item in items:
            try:
                if config.given and len(item.responses) != 1:
                    raise Rejected(Reason.NOT_ONE_ANSWER, f"{len(item.responses)} responses")
                as_prompt(item, self.renderer, config.max_prompt_tokens)
                self.items[item.number] = item
            except Rejected as rejected:
                self.report.reject(item.number, rejected.reason, rejected.detail)
        self.check()
        self.policy = Policy.from_pretrained(config.model, freeze=True, **config.model_options())
        self.context = getattr(self.policy.model.config.get_text_config(), "max_position_embeddings", None)
        ends = eos_token_ids(self.tokenizer, self.policy.model)
        self.engine = Engine(self.policy.model, eos_token_ids=ends, tokenizer=self.tokenizer)
        self.folder.open()
        check_same_items(self.output / "rows.crc32", list(self.items.values()))

    def __iter__(self) -> Iterator[str]:
        first = self.first_responses()
        transcripts: dict[int, Row] = {
            number: {"prompt": self.items[number].prompt, "response": text, "finished": finished, "rounds": []}
            for number, (text, finished) in first.items()
        }
        responses = {number: text for number, (text, _) in first.items()}
        yield f"{len(responses)} responses"
        for round_number in range(1, self.config.rounds + 1):
            path = self.output / f"round-{round_number}.jsonl"
            if not path.exists():
                rows_of_round = self.round(round_number, responses)
                self.folder.check()
                write_jsonl(path, rows_of_round)
            rows = _rows_of(path, responses)
            note_new(self.output, path.name)
            self.keep(rows)
            responses = {number: row["revision"] for number, row in rows.items() if "reason" not in row}
            for number in responses:
                transcripts[number]["rounds"].append(rows[number])
            yield f"round {round_number} of {self.config.rounds}: {len(responses)} revisions"
        done = {number: transcripts[number] for number in responses}
        summary = self.write(done)
        self.folder.close()
        yield str(self.report)
        yield (
            f"{summary['demonstrations']} demonstrations, {summary['pairs']} pairs; {summary['unchanged']} responses "
            f"came out unchanged, {summary['critiques_cut_off']} critiques were cut off"
        )

    def check(self) -> None:
        """Raises DataError when too many rows have been rejected, or all."""
        check_rejection_rate(self.report, self.config.max_rejected)
        if not self.items:
            raise DataError(f"data: no row can be used\n{self.report}")

    def keep(self, rows: Mapping[int, Row]) -> None:
        """Goes on with the rows that have no reason not to."""
        for number, row in rows.items():
            if "reason" in row:
                self.report.reject(self.items.pop(number).number, Reason(row["reason"]), row["detail"])
        self.check()

    def first_responses(self) -> dict[int, tuple[str, bool]]:
        """The response that each row begins with, by its number, and whether it ended by itself."""
        if self.config.given:
            return {number: (item.responses[0], item.finished[0]) for number, item in self.items.items()}
        path = self.output / "responses.jsonl"
        if not path.exists():
            drawn = self.sample({number: item.prompt for number, item in self.items.items()}, 0, "respond")
            write_jsonl(path, [{"row": number, **row} for number, row in drawn.items()])
        rows = _rows_of(path, self.items)
        note_new(self.output, path.name)
        self.keep(rows)
        return {number: (rows[number]["text"], rows[number]["finished"]) for number in self.items}

    def round(self, round_number: int, responses: Mapping[int, str]) -> list[Row]:
        """Principle, critique and revision of each response, or the reason why there is none."""
        config, chat = self.config, self.renderer.chat
        chosen = {
            number: draw(self.principles, seed=config.seed, round_number=round_number, row=number)
            for number in responses
        }
        asked = {
            number: ask_critique(self.items[number].prompt, text, chosen[number], chat=chat)
            for number, text in responses.items()
        }
        critiques = self.sample(asked, 2 * round_number - 1, f"criticise, round {round_number}")
        written = {number: row for number, row in critiques.items() if "text" in row}
        asked = {
            number: ask_revision(self.items[number].prompt, responses[number], chosen[number], row["text"], chat=chat)
            for number, row in written.items()
        }
        revisions = self.sample(asked, 2 * round_number, f"revise, round {round_number}", whole=True)
        rows: list[Row] = []
        for number in responses:
            last = revisions.get(number, critiques[number])
            if "reason" in last:
                rows.append({"row": number, **last})
                continue
            critique = critiques[number]
            row = {"row": number, "principle": chosen[number].name, "critique": critique["text"]}
            rows.append({**row, "critique_finished": critique["finished"], "revision": last["text"]})
        return rows

    def sample(
        self, asked: Mapping[int, Conversation], purpose: int, what: str, *, whole: bool = False
    ) -> dict[int, Row]:
        """What the model writes, by number: {text, finished}, or {reason, detail} where that cannot be used.

        purpose: a number of its own for each call; with the row's number and the seed of the run it makes the seed of a
        draw; whole: a text that was cut off cannot be used"""
        config, tokens = self.config, {}
        rows: dict[int, Row] = {}
        for number, conversation in asked.items():
            tokens[number] = self.renderer.prompt(conversation)
            total = len(tokens[number]) + config.max_new_tokens
            if self.context is not None and total > self.context:
                del tokens[number]
                detail = f"{what}: {total} tokens with the new ones, the model's context is {self.context}"
                rows[number] = {"reason": str(Reason.TOO_LONG), "detail": detail}
        stop = () if self.renderer.chat else STOPS
        sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature, stop=stop)
        seeds = [(config.seed << 32) + (purpose << 24) + number for number in tokens]
        device = self.policy.model.device
        with (
            MetricsLog.progress(what, len(tokens) * config.max_new_tokens) as done,
            autocasting(device, self.policy.autocast),
        ):
            samples = self.engine.generate(list(tokens.values()), sampling, seeds=seeds, progress=done)
        for number, sample in zip(tokens, samples, strict=True):
            text = self.tokenizer.decode(sample.response, skip_special_tokens=True)
            for end in stop:
                text = text.partition(end)[0]
            if not text.strip():
                rows[number] = {"reason": str(Reason.EMPTY_RESPONSE), "detail": what}
            elif whole and not sample.finished:
                rows[number] = {"reason": str(Reason.CUT_OFF), "detail": f"{what}: {config.max_new_tokens} tokens"}
            else:
                rows[number] = {"text": text.strip() if self.renderer.chat else text, "finished": sample.finished}
        return {number: rows[number] for number in asked}

    def write(self, done: Mapping[int, Row]) -> Row:
        """Writes what came out of it; returns the summary."""
        demonstrations, pairs, unchanged = [], [], 0
        for number, transcript in done.items():
            revision, columns = transcript["rounds"][-1]["revision"], self.items[number].columns
            demonstrations.append({"prompt": transcript["prompt"], "completion": revision, **columns})
            if revision.strip() == transcript["response"].strip():
                unchanged += 1
                continue
            sides = {"chosen": revision, "rejected": transcript["response"]}
            ends = {"rejected_finished": transcript["finished"]}
            pairs.append({"prompt": transcript["prompt"], **sides, **ends, "rater": "revision", **columns})
        rounds = [each for transcript in done.values() for each in transcript["rounds"]]
        summary: Row = {
            "rows": self.report.num_rows,
            "demonstrations": len(demonstrations),
            "pairs": len(pairs) if self.config.pairs else 0,
            "unchanged": unchanged,
            "critiques_cut_off": sum(not each["critique_finished"] for each in rounds),
            "principles": dict(sorted(Counter(each["principle"] for each in rounds).items())),
            "rejected": rejected_by_reason(self.report),
        }
        write_jsonl(self.output / "demonstrations.jsonl", demonstrations)
        if self.config.pairs:
            write_jsonl(self.output / "pairs.jsonl", pairs)
        write_jsonl(self.output / "transcripts.jsonl", done.values())
        write_json(self.output / "summary.json", summary)
        return summary


def _rows_of(path: Path, numbers: Collection[int]) -> dict[int, Row]:
    """The rows of a file by their numbers. Raises: ValueError unless there are those."""
    rows = {row.pop("row", None): row for row in read_jsonl(path)}
    if rows.keys() != set(numbers):
        raise UserError(f"resume: {path} is damaged: it lacks rows; delete it to have it made again")
    return rows
