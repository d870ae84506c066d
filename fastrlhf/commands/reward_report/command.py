"""`fastrlhf evaluate reward`: scores held-out pairs and tells how far the scores can be trusted (docs/trust.md).

Everything is read and checked before the first pair is scored; what is written is written whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrlhf.commands.reward_report.findings import verdict
from fastrlhf.commands.reward_report.page import page
from fastrlhf.commands.reward_report.summary import Evidence, score_rows, summarize
from fastrlhf.data import Loaded, Pair, Prompt, Ranking, layout_of, load_pairs, load_prompts
from fastrlhf.data.comparisons import comparisons
from fastrlhf.data.probes import load_probes
from fastrlhf.data.template import eos_token_ids, load_tokenizer
from fastrlhf.errors import DataError, OutputError, UserError
from fastrlhf.evaluation import plots
from fastrlhf.generation.sampling import Sample
from fastrlhf.models.policy import RewardModel
from fastrlhf.models.shared_prompts import can_share_prompts
from fastrlhf.packing import pack
from fastrlhf.rewards.combine import parse_reward, sources_of
from fastrlhf.rewards.scorer import Scorer
from fastrlhf.rewards.sources import is_model, short_names, split_head
from fastrlhf.runtime import distributed
from fastrlhf.runtime.atomic_io import write_file
from fastrlhf.runtime.jsonl import write_jsonl
from fastrlhf.runtime.lock import Lock, check_free_above
from fastrlhf.runtime.metrics import MetricsLog
from fastrlhf.runtime.output_folder import check_reads_none_of
from fastrlhf.settings.trust import EvaluateRewardConfig
from fastrlhf.trainers.loading import check_fits
from fastrlhf.trainers.objectives import LOADERS
from fastrlhf.trainers.packed_rows import full_sequences, pack_rows

FILES = ("report.html", "summary.json", "scores.jsonl")


class EvaluateReward:
    """Makes the report; iterate over it to do so. It yields lines that say how far it is.

    Raises: what the configuration, the data, a model or the output folder are refused for, before a pair is scored."""

    def __init__(self, config: EvaluateRewardConfig) -> None:
        self.config = config
        if distributed.start() > 1:
            raise UserError("evaluate reward: one process does it all; start it without torchrun")
        check_output(config)
        self.lock = Lock(Path(config.output))
        check_free_above(Path(config.output))
        for source in config.models:
            if [*sources_of(parse_reward(source))] != [source]:
                raise UserError(f"model: {source!r} is not one reward model or function; separate several by commas")
        if config.plots and not plots.available():
            raise UserError(
                "plots: matplotlib is not installed: pip install matplotlib, or 'fastrlhf[demo]'; --no-plots makes a "
                "page of tables alone"
            )
        self.device, self.names = config.resolve_device(), names_of(config.models)
        self.tokenizer = load_tokenizer(config.tokenizer or first_folder(config.models))
        self.reports: list[str] = []
        self.pairs = self.of_head(comparisons(self.read(LOADERS[layout_of(config.data)][0], config.data)))
        if not self.pairs:
            raise DataError(f"data: {config.data}: no two responses to one prompt were judged differently")
        self.benchmark = self.read(load_pairs, config.benchmark)
        for n, pair in enumerate(self.benchmark, 1):
            if not isinstance(pair.columns.get(config.subset_column), str):
                raise DataError(f"data: {config.benchmark}: pair {n} has no text in column {config.subset_column!r}")
        probes = self.read(load_probes, config.sycophancy)
        self.probes = [
            Pair(prompt, probe.agreeing, probe.disagreeing, columns=probe.columns)
            for probe in probes
            for prompt in (probe.prompt, probe.prompt_with_opinion)
        ]
        self.reference = [
            prompt.tokens
            for prompt in self.read(load_prompts, config.reference_data, max_prompt_tokens=config.max_length)
        ]
        self.scorers = [self.scorer(source) for source in config.models]

    def __iter__(self) -> Iterator[str]:
        yield from self.reports
        every = [*self.pairs, *self.benchmark, *self.probes]
        scores = []
        for name, scorer in zip(self.names, self.scorers, strict=True):
            scores.append(self.score(name, scorer, every))
            yield f"{name}: {len(every)} pairs scored"
        pairs, benchmark, probes = torch.stack(scores).split(
            [len(self.pairs), len(self.benchmark), len(self.probes)], dim=1
        )
        evidence = Evidence(self.names, self.pairs, pairs, self.benchmark, benchmark, probes, self.reference)
        summary = {"files": self.reports, **summarize(evidence, self.config, self.tokenizer)}
        rows = score_rows(evidence)
        self.lock.check()
        output = Path(self.config.output)
        write_jsonl(output / "scores.jsonl", rows)
        write_file(output / "summary.json", (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode())
        write_file(output / "report.html", page(summary, with_plots=self.config.plots).encode())
        self.lock.release()
        yield verdict(summary)

    def read(self, load: Callable[..., Loaded[Any]], path: str | None, **options: Any) -> list[Any]:
        """The usable rows of a file, none where there is no file; keeps the report on them."""
        if path is None:
            return []
        config = self.config
        if not options:
            options["max_tokens"] = config.max_length
        loaded = load(
            path,
            self.tokenizer,
            template=config.template,
            template_kwargs=config.template_kwargs,
            max_rejected=config.max_rejected,
            limit=config.limit,
            **options,
        )
        loaded.report.notes.clear()  # they say which columns a loop would not use
        self.reports.append(str(loaded.report))
        return loaded.rows

    def of_head(self, pairs: list[Pair]) -> list[Pair]:
        """The pairs for the one head that all models name, where there are such; otherwise all pairs."""
        heads = {split_head(source)[1] if is_model(source) else None for source in self.config.models}
        own = [pair for pair in pairs if {pair.head} == heads and pair.head]
        if own and len(own) < len(pairs):
            (head,) = heads
            self.reports.append(f"{len(own)} of {len(pairs)} pairs are for the head {head}; the others are left out")
        return own or pairs

    def scorer(self, source: str) -> Scorer:
        """What scores with a model, checked: that it reads all that there is to score."""
        every = [*self.pairs, *self.benchmark, *self.probes]
        scorer = Scorer(
            source,
            self.tokenizer,
            max_tokens=self.config.max_tokens,
            columns={name for pair in every for name in pair.columns},
            device=self.device,
            autocast=self.config.autocast_dtype(),
            **self.config.reward_options(),
        )
        for model, _ in scorer.models:
            longest = max(len(side) for pair in every for side in full_sequences(pair))
            check_fits(model.model, self.tokenizer, longest_row=longest)
        return scorer

    @torch.no_grad()
    def score(self, name: str, scorer: Scorer, pairs: Sequence[Pair]) -> Tensor:
        """The scores (N, 2) of the chosen and the rejected response of each pair, float64 on the CPU.

        Raises: ValueError for a score that is not finite."""
        if scorer.models:
            scores = self.score_packed(name, scorer.models[0][0], pairs)
        else:
            scores = self.score_texts(scorer, pairs)
        scores = scores.double().cpu().view(-1, 2)
        for n, row in enumerate(scores.isfinite().all(1).tolist(), 1):
            if not row:
                raise UserError(f"{name}: the scores of pair {n} are {scores[n - 1].tolist()}")
        return scores

    def score_packed(self, name: str, model: RewardModel, pairs: Sequence[Pair]) -> Tensor:
        """The scores (2N,) by a model: each different response once, and its prompt, where it can, once for several."""
        places: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
        for pair in pairs:
            own = places.setdefault(tuple(pair.prompt), {})
            for response in pair.responses:
                own.setdefault(tuple(response), len(own))
        rows = [Ranking(list(prompt), [list(response) for response in own], []) for prompt, own in places.items()]
        share = can_share_prompts(model, self.device)
        batch = pack_rows(rows, share_prompts=share, as_responses=False, device=self.device)
        found = []
        with MetricsLog.progress(f"score by {name}", batch.num_tokens_unshared) as done:
            for part in batch.microbatches(self.config.max_tokens):
                found.append(model(part))
                done(part.num_tokens_unshared)
        starts = dict(zip(places, accumulate(map(len, places.values()), initial=0), strict=False))
        asked = [(tuple(pair.prompt), tuple(response)) for pair in pairs for response in pair.responses]
        return torch.cat(found)[[starts[prompt] + places[prompt][response] for prompt, response in asked]]

    def score_texts(self, scorer: Scorer, pairs: Sequence[Pair]) -> Tensor:
        """The scores (2N,) by a function of texts."""
        texts = self.tokenizer.batch_decode([pair.prompt for pair in pairs], skip_special_tokens=True)
        prompts = [
            Prompt(pair.prompt, text, pair.columns) for pair, text in zip(pairs, texts, strict=True) for _ in (0, 1)
        ]
        ends = eos_token_ids(self.tokenizer)
        samples = [
            Sample(pair.prompt, response, [], [], response[-1] in ends)
            for pair in pairs
            for response in (pair.chosen, pair.rejected)
        ]
        batch = pack([sample.prompt + sample.response for sample in samples])
        (scores,) = scorer.terms(prompts, samples, batch)
        return scores


def check_output(config: EvaluateRewardConfig) -> None:
    """Raises FileExistsError for a folder that holds a report, unless it is to be replaced, or for a file."""
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise OutputError(f"output: {config.output} is a file")
    there = [name for name in FILES if (output / name).exists()]
    if there and not config.overwrite:
        raise OutputError(f"output: {config.output} holds an earlier report ({there[0]}); --overwrite replaces it")
    check_reads_none_of(config, [output / name for name in there])


def names_of(sources: Sequence[str]) -> list[str]:
    """A name for each model: the end of its source, or all of it where that says nothing, as in runs/reward/model."""
    names = short_names(sources)
    return list(sources) if "model" in names else names


def first_folder(sources: Sequence[str]) -> str:
    """The first source that is a model, whose tokenizer serves for all.

    Raises: ValueError when all are functions."""
    for source in sources:
        if is_model(source):
            return split_head(source)[0]
    raise UserError("tokenizer: functions have none; give --tokenizer FOLDER")
