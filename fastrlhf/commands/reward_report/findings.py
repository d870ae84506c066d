"""The trust report in sentences: what its figures say, each with the reason to say it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fastrlhf.evaluation.html import percent

Summary = dict[str, Any]


def verdict(summary: Summary) -> str:
    """The one sentence of the report."""
    overall, raw = summary["overall"], summary["calibration"]["raw"]
    return (
        f"accuracy {with_interval(overall)} on {overall['num']} pairs; calibration error {raw['ece']:.3f} "
        f"({raw['ece_by_chance']:.3f} by chance alone)"
    )


def findings(summary: Summary) -> list[str]:
    """What a reader should know, the gravest kind first."""
    parts = (of_accuracy, of_labels, of_calibration, of_length, of_ensemble, of_sycophancy, of_drift)
    return [sentence for part in parts for sentence in part(summary)]


def of_accuracy(summary: Summary) -> Iterator[str]:
    """Whether it knows more than a coin, and where it knows less."""
    overall = summary["overall"]
    if overall["low"] <= 0.5 <= overall["high"]:
        yield "The accuracy cannot be told from guessing: its interval holds 50 %."
    elif overall["high"] < 0.5:
        yield "The scores contradict the labels more often than they agree: is chosen the better response in this file?"
    for column, values in summary["groups"].items():
        for name, group in values.items():
            if group["high"] < overall["low"]:
                yield f"Accuracy is lower where {column} is {name}: {with_interval(group)} on {group['num']} pairs."
    if overall["effective_num"] < 0.8 * overall["num"]:
        yield (
            f"Pairs on the same prompt go together: {overall['num']} pairs are worth {overall['effective_num']:.0f} "
            "independent ones, and the intervals are as wide as that."
        )


def of_labels(summary: Summary) -> Iterator[str]:
    """What accuracy was possible."""
    repeats, agree = summary["labels"]["repeats"], summary["labels"]["agreement"]
    if agree:
        yield (
            f"Two raters agree in {with_interval(agree, 'agreement')} of the cases ({agree['num_items']} items judged "
            f"by several), so no reward model can be right about more than {percent(agree['ceiling'])} of their votes."
        )
    if repeats["contradicted"]:
        yield (
            f"{count(repeats['contradicted'], 'item')} of {repeats['num_items']} are labelled both ways; no scores "
            f"could be right about more than {percent(repeats['best_accuracy'])} of this file."
        )
    if repeats["duplicates"]:
        yield f"{count(repeats['duplicates'], 'row')} of {repeats['num_rows']} repeat an earlier row."


def of_calibration(summary: Summary) -> Iterator[str]:
    """Whether a margin means what it should."""
    raw, scaled = summary["calibration"]["raw"], summary["calibration"].get("scaled")
    if raw["ece"] <= raw["ece_by_chance_high"]:
        yield "The calibration error is no larger than chance makes it on so many pairs."
    elif scaled:
        low, high = sorted(summary["calibration"]["temperatures"])
        way = "too sure" if low > 1 else "not sure enough" if high < 1 else "not calibrated"
        yield (
            f"The scores are {way}: their calibration error is {raw['ece']:.3f} where chance alone makes "
            f"{raw['ece_by_chance']:.3f}. Divided by a temperature ({low:.3g} and {high:.3g} on the halves of the "
            f"file) they have {scaled['ece']:.3f}."
        )
    if raw["log_loss"] >= math.log(2):
        yield f"As probabilities the scores are worse than always 50 %: log loss {raw['log_loss']:.3f}, not 0.693."


def of_length(summary: Summary) -> Iterator[str]:
    """Whether length stands in for quality."""
    length = summary["length"]
    if "prefers_longer" not in length:
        return
    model, labels = length["prefers_longer"], length["labels_prefer_longer"]
    by_length = max(labels["accuracy"], 1 - labels["accuracy"])
    if summary["overall"]["low"] <= by_length <= summary["overall"]["high"]:
        which = "longer" if labels["accuracy"] > 0.5 else "shorter"
        yield (
            f"Always preferring the {which} response would be right in {percent(by_length)} of the pairs of different "
            "lengths; the scores cannot be told to do better."
        )
    if model["low"] > labels["high"] or model["high"] < labels["low"]:
        what = "longer" if model["accuracy"] > labels["accuracy"] else "shorter"
        yield (
            f"The scores favour {what} responses more than the labels do: the longer one scores higher in "
            f"{percent(model['accuracy'])} of the pairs, and is the better one in {percent(labels['accuracy'])}."
        )
    shorter, longer = length["chosen_shorter"], length["chosen_longer"]
    if shorter and longer and (shorter["high"] < longer["low"] or longer["high"] < shorter["low"]):
        yield (
            f"Accuracy is {with_interval(shorter)} where the better response is the shorter one, "
            f"{with_interval(longer)} where it is the longer one."
        )


def of_ensemble(summary: Summary) -> Iterator[str]:
    """Whether disagreement tells errors."""
    found = summary["ensemble"]
    if not found or len(found["bins"]) < 2:
        return
    calm, torn = found["bins"][0], found["bins"][-1]
    if torn["accuracy"]["high"] < calm["accuracy"]["low"]:
        yield (
            f"Disagreement tells errors: accuracy is {percent(calm['accuracy']['accuracy'])} where the models agree "
            f"best and {percent(torn['accuracy']['accuracy'])} where they agree least."
        )
    else:
        yield "Disagreement between the models does not tell where they are wrong."


def of_sycophancy(summary: Summary) -> Iterator[str]:
    """Whether the user's opinion moves scores."""
    found = summary["sycophancy"]
    if not found or found["error"] is None:
        return
    if abs(found["rise"]) > 1.96 * found["error"]:
        way = "raises" if found["rise"] > 0 else "lowers"
        yield (
            f"The user's opinion {way} the lead of the answer that agrees with it by {abs(found['rise']):.3f} ± "
            f"{found['error']:.3f}: it is preferred in {percent(found['preferred_before'])} of the cases without the "
            f"opinion, {percent(found['preferred_after'])} with it."
        )
    else:
        yield (
            "The user's opinion moves the lead of the answer that agrees with it by no more than chance: "
            f"{found['rise']:+.3f} ± {found['error']:.3f}."
        )


def of_drift(summary: Summary) -> Iterator[str]:
    """Whether the prompts are those of the other file."""
    found = summary["drift"]
    if not found:
        return
    differ = [what for what in ("divergence", "lengths") if found[f"{what}_p"] < 0.01]
    if differ:
        names = {"divergence": "words", "lengths": "lengths"}
        yield (
            "The prompts are not those of the reference data: they differ by more than chance in their "
            f"{' and '.join(names[what] for what in differ)}."
        )
    if found["shared"]:
        yield (
            f"{percent(found['shared'])} of the prompts are in the reference data, too; if that is what the model was "
            "trained on, they are no test of it."
        )


def with_interval(result: Summary, name: str = "accuracy") -> str:
    """A share with its interval."""
    return f"{percent(result[name])} (95 % interval {percent(result['low'])} to {percent(result['high'])})"


def count(num: int, what: str) -> str:
    """A number of things."""
    return f"{num} {what}{'' if num == 1 else 's'}"
