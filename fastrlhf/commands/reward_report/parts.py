"""The sections of the trust report: each says what its figures are and how to read them."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from fastrlhf.commands.reward_report import plots
from fastrlhf.commands.reward_report.findings import percent
from fastrlhf.evaluation.html import table
from fastrlhf.stats.means import with_error

Summary = dict[str, Any]
HEAD = ["", "pairs", "accuracy", "95 % interval", "ties"]
BINS = {
    "length": ("by length", "tokens of a response, mean of both"),
    "length_difference": ("by length difference", "tokens, chosen - rejected"),
    "score_margin": ("by score difference", "its size"),
    "label_margin": ("by label margin", "as the file gives it"),
}


def accuracy(summary: Summary, with_plots: bool) -> Iterator[str]:
    """Accuracy by what the file says of a pair, and by length and score."""
    yield "<h2>Accuracy</h2>"
    whole = {"all pairs": summary["overall"], "all pairs, by their weights": summary["weighted"]}
    yield table(HEAD, [row(name, result) for name, result in whole.items() if result])
    if summary["weighted"]:
        yield note("Pairs of weight 0 are in the first row alone; in all else on this page each pair counts as one.")
    for column, values in summary["groups"].items():
        yield f"<h3>by {escape(column)}</h3>"
        yield table(HEAD, [row(name, result) for name, result in values.items()])
        if with_plots and len(values) > 1:
            yield plots.accuracies(f"Accuracy by {column}", list(values), list(values.values()))
    for kind, results in summary["bins"].items():
        title, what = BINS[kind]
        names = [ends(result) for result in results]
        yield f"<h3>{title}</h3>"
        yield table([what, *HEAD[1:]], [row(name, result) for name, result in zip(names, results, strict=True)])
        if with_plots:
            yield plots.accuracies(f"Accuracy {title}", names, results)
    yield note("Bins hold about equally many pairs; equal values are in one bin.")


def calibration(summary: Summary, with_plots: bool) -> Iterator[str]:
    """Whether score differences are log odds."""
    found = summary["calibration"]
    columns = [("as they are", found["raw"])]
    if "scaled" in found:
        columns.append(("divided by the temperature", found["scaled"]))
    rows = []
    for name, key, guess in (
        ("log loss, nats", "log_loss", "0.693"),
        ("Brier score", "brier", "0.250"),
        ("calibration error (ECE)", "ece", ""),
        ("the same by chance alone: mean", "ece_by_chance", ""),
        ("the same by chance alone: 19 of 20 are below", "ece_by_chance_high", ""),
    ):
        rows.append([name, *(f"{values[key]:.3f}" for _, values in columns), guess])
    yield "<h2>Calibration</h2>"
    yield note(
        "A reward model is trained so that sigmoid(score difference) is the probability that the first response is the "
        "better one. The curve shows how often that is so; the calibration error is its mean distance from the "
        "diagonal. A head of ratings is not trained so, and its scores are in their units: read its order, not this. "
        "It is never 0 on finitely many pairs: what chance alone makes of it, were they independent, stands "
        "beside it."
    )
    yield table(["scores", *(name for name, _ in columns), "always saying 50 %"], rows)
    if "temperatures" in found:
        first, second = found["temperatures"]
        far = max(first, second) > 4 * min(first, second)
        yield note(
            f"Temperatures: {first:.3g} fitted on one half of the prompts and used on the other, {second:.3g} the "
            f"other way round; {found['temperature']:.3g} on all pairs, to be used elsewhere. Above "
            "1 the scores are too sure, below 1 not sure enough. Accuracy does not depend on it."
            + (" That they differ so much means that these pairs cannot tell." if far else "")
        )
    if with_plots:
        curves = {name: found[f"{key}_curve"] for (name, _), key in zip(columns, ("raw", "scaled"), strict=False)}
        yield plots.reliability(curves)


def length(summary: Summary, with_plots: bool) -> Iterator[str]:
    """Whether length stands in for quality."""
    found = summary["length"]
    yield "<h2>Length</h2>"
    yield note(
        "Lengths are tokens of the response. Within pairs the prompt is the same, so a correlation of the differences "
        "there is one of length, not of the kind of prompt; it may still be that longer responses are better."
    )
    rows = [
        ["score and length, over all responses", number(found["pearson"]), number(found["spearman"])],
        [
            "score difference and length difference, within pairs",
            *(
                f"{number(found[f'paired_{kind}'])} ({' to '.join(map(number, found[f'paired_{kind}_interval']))})"
                for kind in ("pearson", "spearman")
            ),
        ],
    ]
    yield table(["correlation (95 % interval)", "Pearson", "Spearman (ranks)"], rows)
    cases = [(f"chosen is {name}", found[f"chosen_{name}"]) for name in ("shorter", "same", "longer")]
    yield table(HEAD, [row(name.replace("same", "as long"), result) for name, result in cases if result])
    if "prefers_longer" in found:
        both = [(what, found[key]) for what, key in (("scores", "prefers_longer"), ("labels", "labels_prefer_longer"))]
        yield table(
            ["the longer response is preferred by the", "pairs", "share", "95 % interval"],
            [row(what, result)[:4] for what, result in both],
        )
    yield f"<p>Mean length: chosen {found['mean_chosen']:.1f}, rejected {found['mean_rejected']:.1f} tokens.</p>"
    if with_plots:
        yield plots.margins_over_length(found["points"])


def labels(summary: Summary, with_plots: bool) -> Iterator[str]:
    """What the labels are worth."""
    repeats, agree = summary["labels"]["repeats"], summary["labels"]["agreement"]
    yield "<h2>Labels</h2>"
    yield note(
        "An item is a prompt with two responses, in either order. Items that are labelled both ways limit what "
        "accuracy is possible on this file; agreement between raters limits it on any labels of theirs."
    )
    own = repeats["self_contradicted"]
    rows = [
        ["pairs, and different items among them", f"{repeats['num_rows']}, {repeats['num_items']}"],
        ["rows that repeat an earlier one", str(repeats["duplicates"])],
        ["items labelled both ways", str(repeats["contradicted"])],
        ["items that one rater labelled both ways", "no rater is named" if own is None else str(own)],
        ["highest accuracy that any scores could have on this file", percent(repeats["best_accuracy"])],
    ]
    yield table(["", ""], rows)
    if agree is None:
        yield "<p>No item was judged by several raters that are named, so the ceiling that they set is not known.</p>"
        return
    ceiling = f"{percent(agree['ceiling'])} (at the upper end of the interval {percent(agree['ceiling_high'])})"
    rows = [
        ["items judged by several raters", str(agree["num_items"])],
        ["two raters agree", f"{percent(agree['agreement'])} ({percent(agree['low'])} to {percent(agree['high'])})"],
        ["kappa, agreement beyond that of coins", number(agree["kappa"])],
        ["best possible accuracy on single votes: at least", percent(agree["ceiling_low"])],
        ["best possible accuracy on single votes: at most", ceiling],
    ]
    yield table(["agreement of raters", ""], rows)
    shares = [[name, str(num), percent(share)] for name, (num, share) in agree["raters"].items()]
    yield table(["rater", "shared items", "others agree"], shares)


def ensemble(summary: Summary, with_plots: bool) -> Iterator[str]:
    """Whether models know where they are wrong."""
    found = summary["ensemble"]
    if found is None:
        return
    yield "<h2>Ensemble</h2>"
    yield note(
        "All other sections are about the mean of the models' scores. min takes each response's lowest score, "
        "mean - std the mean less the standard deviation of the models; --reward has them as mean, min and lcb. Where "
        "models score on different scales, they follow the largest."
    )
    yield table(
        [*HEAD, "log loss", "ECE", "mean score", "sd"],
        [
            [*row(own["name"], own), *map(number, (own["log_loss"], own["ece"], own["mean"], own["std"]))]
            for own in found["members"]
        ],
    )
    names = {"mean": "mean", "min": "min", "mean_minus_std": "mean - std"}
    yield table(HEAD, [row(name, found[key]) for key, name in names.items()])
    rows = [
        ["mean standard deviation of a response's score", number(found["score_std"])],
        ["mean standard deviation of a pair's score difference", number(found["margin_std"])],
        ["pairs whose better response they do not agree on", percent(found["split"])],
    ]
    yield table(["disagreement", ""], rows)
    results = [each["accuracy"] for each in found["bins"]]
    names_of_bins = [number(each["disagreement"]) for each in found["bins"]]
    what = "standard deviation, mean"
    yield table([what, *HEAD[1:]], [row(name, result) for name, result in zip(names_of_bins, results, strict=True)])
    if with_plots:
        yield plots.accuracies("Accuracy by disagreement", names_of_bins, results)


def benchmark(summary: Summary, with_plots: bool) -> Iterator[str]:
    """The sections of a benchmark."""
    found = summary["benchmark"]
    if found is None:
        return
    yield "<h2>Benchmark</h2>"
    yield note(
        "As RewardBench does it: a section is the mean over its pairs (math-prm weighs what all hep-* do), the overall "
        "figure is the mean over sections."
    )
    rows = [[section, percent(share)] for section, share in found["sections"].items()]
    yield table(["section", "accuracy"], [*rows, ["overall", percent(found["overall"])]])
    subsets = found["subsets"]
    yield table(
        ["subset", *HEAD[1:], "section"], [[*row(name, own), section] for name, (section, own) in subsets.items()]
    )
    if with_plots:
        yield plots.accuracies("Accuracy by subset", list(subsets), [own for _, own in subsets.values()])


def sycophancy(summary: Summary, with_plots: bool) -> Iterator[str]:
    """Whether the user's opinion moves scores."""
    found = summary["sycophancy"]
    if found is None:
        return
    yield "<h2>Sycophancy</h2>"
    yield note(
        f"{found['num']} questions, each asked without and with the user's opinion. The lead is the score of the "
        "answer that agrees with the opinion less that of the other. Both answers stay as they are, so a score that is "
        "blind to opinions has a rise of 0. ± is one standard error over questions."
    )
    rises = [
        ["mean lead", number(found["lead_before"]), number(found["lead_after"]), plus(found, "rise", "error")],
        [
            "agreeing answer preferred",
            percent(found["preferred_before"]),
            percent(found["preferred_after"]),
            f"lead rises in {percent(found['risen'])}",
        ],
        ["mean probability of it", "", "", plus(found, "rise_of_probability", "error_of_probability")],
    ]
    yield table(["", "without the opinion", "with it", "rise"], rises)


def drift(summary: Summary, with_plots: bool) -> Iterator[str]:
    """Whether the prompts are those of another file."""
    found = summary["drift"]
    if found is None:
        return
    yield "<h2>Prompts beside the reference data</h2>"
    yield note(
        f"{found['num'][0]} different prompts of the reference data and {found['num'][1]} of this file. A small "
        "p-value (say below 0.01) means that they are not draws of one distribution; chance is what remains when all "
        "prompts are dealt out to two sets anew."
    )
    rows = [
        [what, *(number(found[f"{key}{end}"]) for end in ("", "_by_chance", "_p"))]
        for what, key in (
            ("words: Jensen-Shannon divergence, bits", "divergence"),
            ("lengths: Kolmogorov-Smirnov", "lengths"),
        )
    ]
    yield table(["difference, 0 to 1", "found", "by chance", "p-value"], rows)
    yield f"<p>{percent(found['shared'])} of this file's prompts are in the reference data.</p>"
    if found["divergence_p"] < 0.05:
        tokens = [[repr(token), f"{first:.2%}", f"{second:.2%}"] for token, first, second in found["tokens"]]
        yield table(["tokens that differ most, shares", "reference data", "this file"], tokens)


def errors(summary: Summary, with_plots: bool) -> Iterator[str]:
    """The pairs on which the scores are surest and wrong."""
    if not summary["errors"]:
        return
    yield f"<h2>The {len(summary['errors'])} surest errors</h2>"
    yield note("Read them: some are errors of the scores, some of the labels. Long texts are cut in their middle.")
    rows = [
        [str(own["pair"]), f"{own['probability']:.3f}", own["prompt"], own["chosen"], own["rejected"]]
        for own in summary["errors"]
    ]
    yield table(["pair", "P(chosen)", "prompt", "chosen", "rejected"], rows, kind="samples")


def row(name: str, result: Summary) -> list[str]:
    """A row of a table of accuracies."""
    interval = f"{percent(result['low'])} to {percent(result['high'])}"
    return [name, str(result["num"]), percent(result["accuracy"]), interval, str(result["ties"])]


def ends(result: Summary) -> str:
    """From where to where a bin goes."""
    low, high = (f"{round(result[end], 3):g}" for end in ("from", "to"))
    return low if low == high else f"{low} to {high}"


def number(value: float | None) -> str:
    """A number as text; none where there is none, as of a constant's correlation."""
    return "none" if value is None else f"{value:.3f}"


def plus(found: Summary, name: str, error: str) -> str:
    """A mean with its standard error."""
    return with_error(found[name], found[error], "+.3f")


def note(text: str) -> str:
    """A paragraph that explains."""
    return f'<p class="note">{escape(text)}</p>'


PARTS = (accuracy, calibration, length, labels, ensemble, benchmark, sycophancy, drift, errors)
