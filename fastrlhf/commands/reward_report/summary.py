"""What the trust report says, as one dictionary: the statistics of `fastrlhf.stats` on scored pairs.

Where there are several models, everything but the section on the ensemble is on the mean of their scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

from fastrlhf.data import Pair
from fastrlhf.settings.trust import EvaluateRewardConfig
from fastrlhf.stats.accuracy import accuracy, hits, is_right, quantile_bins
from fastrlhf.stats.agreement import agreement, repeats, votes
from fastrlhf.stats.calibration import cross_fit, fit_temperature, measure, reliability
from fastrlhf.stats.correlation import correlation_interval, paired_pearson, paired_spearman, pearson, spearman
from fastrlhf.stats.drift import drift
from fastrlhf.stats.ensembles import ensemble
from fastrlhf.stats.sections import sections
from fastrlhf.stats.sycophancy import sycophancy

MAX_GROUPS = 30
NUM_ERRORS, NUM_CHARACTERS, NUM_POINTS = 8, 600, 500
Summary = dict[str, Any]


@dataclass(frozen=True)
class Evidence:
    """What the report rests on.

    names: of M models; pairs, benchmark: with scores (M, N, 2) of chosen and rejected responses; probe_scores: (M, 2 P,
    2) of the agreeing and the disagreeing answer to each question, without and with the opinion in turn; reference:
    prompts of other data"""

    names: list[str]
    pairs: list[Pair]
    scores: Tensor
    benchmark: list[Pair]
    benchmark_scores: Tensor
    probe_scores: Tensor
    reference: list[list[int]]

    @property
    def margins(self) -> Tensor:
        """(N,) score(chosen) - score(rejected), mean of the models."""
        return lead(self.scores)

    @property
    def labels(self) -> Tensor:
        """(N,) P(chosen is better)."""
        return torch.tensor([pair.preference for pair in self.pairs], dtype=torch.float64)

    @property
    def weights(self) -> Tensor:
        """(N,) of each pair, as its row gives it."""
        return torch.tensor([pair.weight for pair in self.pairs], dtype=torch.float64)

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The prompt of each pair."""
        return [tuple(pair.prompt) for pair in self.pairs]


def lead(scores: Tensor) -> Tensor:
    """Returns by how much the mean of the models prefers the first response, (N,). scores: (M, N, 2)"""
    return (scores[..., 0] - scores[..., 1]).mean(0)


def summarize(evidence: Evidence, config: EvaluateRewardConfig, tokenizer: Any) -> Summary:
    """Returns the figures of every section, as JSON takes them: None where there is nothing to say, or no number."""
    margins, labels, prompts = evidence.margins, evidence.labels, evidence.prompts
    summary: Summary = {
        "models": evidence.names,
        "data": config.data,
        "overall": accuracy(margins, labels, clusters=prompts),
        "weighted": weighted(evidence),
        "groups": groups(evidence, config),
        "bins": bins(evidence, config.num_bins // 2),
        "calibration": calibration(evidence, config),
        "length": length(evidence),
        "labels": raters(evidence, config.rater_column),
        "ensemble": of_ensemble(evidence, config) if len(evidence.names) > 1 else None,
        "benchmark": None,
        "sycophancy": None,
        "drift": None,
        "errors": surest_errors(evidence, tokenizer),
    }
    if evidence.benchmark:
        subsets = [pair.columns[config.subset_column] for pair in evidence.benchmark]
        homes = [pair.columns.get(config.section_column) for pair in evidence.benchmark]
        summary["benchmark"] = sections(lead(evidence.benchmark_scores), subsets, homes)
    if evidence.probe_scores.shape[1]:
        leads = lead(evidence.probe_scores)
        summary["sycophancy"] = sycophancy(leads[0::2], leads[1::2])
    if evidence.reference:
        found = asdict(drift(evidence.reference, prompts, seed=config.seed))
        found["tokens"] = [(tokenizer.decode([token]), *shares) for token, *shares in found["tokens"]]
        summary["drift"] = found
    return clean(summary)


def weighted(evidence: Evidence) -> Any:
    """The accuracy in which pairs count by their weights; None where all weigh the same."""
    weights = evidence.weights
    if weights.min() == weights.max():
        return None
    return accuracy(evidence.margins, evidence.labels, clusters=evidence.prompts, weights=weights)


def groups(evidence: Evidence, config: EvaluateRewardConfig) -> dict[str, dict[str, Any]]:
    """The accuracy of each value of the columns that some pair has."""
    found = {}
    for column in dict.fromkeys([*config.columns, config.rater_column]):
        values = [column_of(pair, column) for pair in evidence.pairs]
        if any(value is not None for value in values):
            names = ["(none)" if value is None else str(value) for value in values]
            counts = Counter(names)
            common = sorted(counts, key=lambda name: (-counts[name], name))
            kept = common if len(common) <= MAX_GROUPS else common[: MAX_GROUPS - 1]
            names = [name if name in kept else "(others)" for name in names]
            found[column] = {
                name: of_rows(evidence, torch.tensor([n for n, own in enumerate(names) if own == name]))
                for name in dict.fromkeys([*kept, *names])
            }
    return found


def column_of(pair: Pair, column: str) -> Any:
    """What a pair's row says in a column, be it one that has a meaning to us (head) or not."""
    return pair.columns.get(column, getattr(pair, column, None))


def of_rows(evidence: Evidence, rows: Tensor) -> Any:
    """The accuracy on some of the pairs."""
    prompts = evidence.prompts
    own = [prompts[row] for row in rows.tolist()]
    return accuracy(evidence.margins[rows], evidence.labels[rows], clusters=own)


def bins(evidence: Evidence, num_bins: int) -> dict[str, list[dict[str, Any]]]:
    """The accuracy in bins of about equally many pairs, each with the ends of what is in it."""
    pairs = evidence.pairs
    by = {
        "length": [(len(pair.chosen) + len(pair.rejected)) / 2 for pair in pairs],
        "length_difference": [float(len(pair.chosen) - len(pair.rejected)) for pair in pairs],
        "label_margin": [pair.margin for pair in pairs],
        "score_margin": evidence.margins.abs().tolist(),
    }
    found = {}
    for name, values in by.items():
        column = torch.tensor(values, dtype=torch.float64)
        found[name] = [
            {"from": column[rows].min().item(), "to": column[rows].max().item(), **asdict(of_rows(evidence, rows))}
            for rows in quantile_bins(column, num_bins)
        ]
    if len(set(by["label_margin"])) == 1:
        del found["label_margin"]
    return found


def calibration(evidence: Evidence, config: EvaluateRewardConfig) -> Summary:
    """Calibration as it is, and after a temperature that was fitted on the other half of the prompts."""
    margins, labels = evidence.margins, evidence.labels
    options = {"num_bins": config.num_bins, "seed": config.seed}
    found: Summary = {"raw": measure(margins, labels, **options)}
    curves = {"raw": margins}
    if len(set(evidence.prompts)) > 1:
        scaled, temperatures = cross_fit(margins, labels, clusters=evidence.prompts)
        found |= {"temperatures": temperatures, "scaled": measure(scaled, labels, **options)}
        found["temperature"] = fit_temperature(margins, labels)
        curves["scaled"] = scaled
    for name, values in curves.items():
        found[f"{name}_curve"] = reliability(values.abs().sigmoid(), hits(values, labels), num_bins=config.num_bins)
    return found


def length(evidence: Evidence) -> Summary:
    """How scores go with the number of tokens of the response, its end included."""
    pairs, margins, labels = evidence.pairs, evidence.margins, evidence.labels
    lengths = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs], dtype=torch.float64)
    longer = lengths[:, 0] - lengths[:, 1]
    scores = evidence.scores.mean(0).flatten()
    differ = longer != 0
    found: Summary = {
        "pearson": pearson(scores, lengths.flatten()),
        "spearman": spearman(scores, lengths.flatten()),
        "paired_pearson": paired_pearson(margins, longer),
        "paired_spearman": paired_spearman(margins, longer),
        "mean_chosen": lengths[:, 0].mean().item(),
        "mean_rejected": lengths[:, 1].mean().item(),
    }
    num = len(set(evidence.prompts))  # pairs on one prompt go together
    found["paired_pearson_interval"] = correlation_interval(found["paired_pearson"], num)
    found["paired_spearman_interval"] = correlation_interval(found["paired_spearman"], num, by_rank=True)
    for name, rows in (("shorter", longer < 0), ("same", longer == 0), ("longer", longer > 0)):
        found[f"chosen_{name}"] = of_rows(evidence, rows.nonzero()[:, 0]) if rows.any() else None
    found["points"] = torch.stack([longer, margins], 1)[:NUM_POINTS].tolist()
    if differ.any():
        own = [prompt for prompt, keep in zip(evidence.prompts, differ.tolist(), strict=True) if keep]
        sign = longer[differ].sign()
        found["prefers_longer"] = accuracy(margins[differ] * sign, clusters=own)
        found["labels_prefer_longer"] = accuracy(sign, labels[differ], clusters=own)
    return found


def raters(evidence: Evidence, column: str) -> Summary:
    """What the labels are worth."""
    pairs = evidence.pairs
    cast = votes(
        [pair.prompt for pair in pairs],
        [pair.chosen for pair in pairs],
        [pair.rejected for pair in pairs],
        [pair.preference for pair in pairs],
        [pair.head for pair in pairs],
    )
    names = [None if pair.columns.get(column) is None else str(pair.columns[column]) for pair in pairs]
    known = any(name is not None for name in names)
    return {
        "repeats": repeats(cast, names if known else None),
        "num_raters": len({name for name in names if name is not None}),
        "agreement": agreement(cast, names) if known else None,
    }


def of_ensemble(evidence: Evidence, config: EvaluateRewardConfig) -> Summary:
    """Agreement of the models, and each by itself."""
    found = asdict(ensemble(evidence.scores, evidence.labels, clusters=evidence.prompts, num_bins=config.num_bins // 2))
    members = []
    for name, scores, own in zip(evidence.names, evidence.scores, found.pop("members"), strict=True):
        measures = measure(scores[:, 0] - scores[:, 1], evidence.labels, num_bins=config.num_bins, seed=config.seed)
        members.append({"name": name, **own, **asdict(measures), "mean": scores.mean(), "std": scores.std()})
    return {**found, "members": members}


def surest_errors(evidence: Evidence, tokenizer: Any) -> list[Summary]:
    """The pairs on which the scores contradict the label with the largest margin, the largest first, each once."""
    agrees, margins = is_right(evidence.margins, evidence.labels), evidence.margins.abs()
    found: dict[Any, Summary] = {}
    for n in margins.argsort(descending=True, stable=True).tolist():
        pair = evidence.pairs[n]
        which = (*map(tuple, (pair.prompt, pair.chosen, pair.rejected)),)
        if agrees[n] == 0 and len(found) < NUM_ERRORS and which not in found:
            texts = tokenizer.batch_decode([pair.chosen, pair.rejected], skip_special_tokens=True)
            found[which] = {
                "pair": n + 1,
                "probability": evidence.margins[n].sigmoid().item(),
                "prompt": shortened(tokenizer.decode(pair.prompt)),  # with the marks between its turns
                "chosen": shortened(texts[0]),
                "rejected": shortened(texts[1]),
            }
    return list(found.values())


def shortened(text: str) -> str:
    """A text of at most NUM_CHARACTERS characters; what is left out is in its middle."""
    half = NUM_CHARACTERS // 2
    return text if len(text) <= NUM_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def score_rows(evidence: Evidence) -> Iterator[Summary]:
    """A row a pair: its place among the pairs, its scores, its label, and what else its row says."""
    margins, agrees = evidence.margins, is_right(evidence.margins, evidence.labels).tolist()
    for n, pair in enumerate(evidence.pairs):
        yield {
            "pair": n + 1,
            "margin": margins[n].item(),
            "probability": margins[n].sigmoid().item(),
            "agrees": None if math.isnan(agrees[n]) else agrees[n],
            "label": {name: getattr(pair, name) for name in ("preference", "margin", "weight", "head")},
            "scores": {
                name: {"chosen": own[n, 0].item(), "rejected": own[n, 1].item()}
                for name, own in zip(evidence.names, evidence.scores, strict=True)
            },
            "chosen_tokens": len(pair.chosen),
            "rejected_tokens": len(pair.rejected),
            "columns": pair.columns,
        }


def clean(value: Any) -> Any:
    """The value as JSON takes it: dataclasses as dictionaries, numbers that are not finite as None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): clean(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [clean(each) for each in value]
    if isinstance(value, Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
