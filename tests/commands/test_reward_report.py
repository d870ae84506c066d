"""What the report says of scores that are made to have one fault."""

import json
from dataclasses import replace

import jinja2
import pytest
import torch
from html_page import Page
from tiny import tiny_tokenizer

from fastrlhf.commands.reward_report.findings import findings, verdict
from fastrlhf.commands.reward_report.page import page
from fastrlhf.commands.reward_report.summary import Evidence, summarize
from fastrlhf.data import Pair
from fastrlhf.settings.trust import EvaluateRewardConfig

pytestmark = pytest.mark.usefixtures("one_thread")
NONE = torch.zeros(1, 0, 2)


def random_pairs(num=400, seed=0, **columns):
    """Pairs on different prompts, whose responses have 1 to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (num, 2), generator=generator).tolist()
    return [Pair([9, n], [20 + n % 7] * a, [30] * b, columns=dict(columns)) for n, (a, b) in enumerate(lengths)]


def told(pairs, margins, *, probes=NONE, reference=(), models=None):
    """Summary and findings of pairs whose chosen responses score `margins` higher."""
    scores = torch.stack([margins, torch.zeros_like(margins)], -1).double()[None] if models is None else models
    names = [f"model{n}" for n in range(len(scores))]
    evidence = Evidence(names, pairs, scores, [], NONE, probes.double(), list(reference))
    config = EvaluateRewardConfig(model="m", data="d", output="o")
    summary = {"files": [], **summarize(evidence, config, tiny_tokenizer())}
    json.dumps(summary, allow_nan=False)
    assert verdict(summary) in page(summary, with_plots=False).lower()
    return summary, " ".join(findings(summary))


def calibrated(num=400, seed=0, right=None):
    """Margins whose sign is right with the probability that they say."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(num, generator=generator) * 3
    return torch.where(torch.rand(num, generator=generator) < size.sigmoid(), size, -size)


def test_sound_scores_are_found_sound():
    _, said = told(random_pairs(), calibrated())
    assert said == "The calibration error is no larger than chance makes it on so many pairs."


def test_pairs_count_by_their_weights_beside_the_plain_accuracy():
    pairs = [replace(pair, weight=float(n % 4)) for n, pair in enumerate(random_pairs())]
    margins = torch.where(torch.arange(400) % 4 == 3, 1.0, -1.0)  # right where the weight is 3, of 0, 1, 2, 3
    summary, _ = told(pairs, margins)
    assert (summary["overall"]["accuracy"], summary["overall"]["num"]) == (0.25, 400)
    assert (summary["weighted"]["accuracy"], summary["weighted"]["num"]) == (pytest.approx(0.5), 300)
    assert "by their weights" in page(summary, with_plots=False)
    summary, _ = told(random_pairs(), margins)
    assert summary["weighted"] is None and "by their weights" not in page(summary, with_plots=False)


def test_scores_that_know_nothing_or_the_contrary():
    signs = torch.where(torch.arange(400) % 2 == 0, 1.0, -1.0)
    assert "cannot be told from guessing" in told(random_pairs(), signs)[1]
    assert "contradict the labels" in told(random_pairs(), -torch.ones(400))[1]


def test_scores_that_are_too_sure_or_not_sure_enough():
    assert "The scores are too sure" in told(random_pairs(), 6 * calibrated())[1]
    assert "The scores are not sure enough" in told(random_pairs(), calibrated() / 20)[1]


def test_scores_that_count_tokens():
    pairs = random_pairs()
    margins = torch.tensor([float(len(pair.chosen) - len(pair.rejected)) for pair in pairs])
    summary, said = told(pairs, margins)
    assert "favour longer responses more than the labels do" in said
    assert summary["length"]["paired_pearson"] == pytest.approx(1)
    assert summary["length"]["chosen_shorter"]["accuracy"] == 0 < summary["length"]["chosen_longer"]["accuracy"] == 1
    assert "favour shorter responses" in told(pairs, -margins)[1]


def test_scores_that_are_no_better_than_length():
    pairs = [Pair([9, n], [20] * (1 if n % 10 < 6 else 9), [30] * 5) for n in range(400)]
    said = told(pairs, torch.where(torch.arange(400) % 10 < 6, 1.0, -1.0))[1]
    assert "Always preferring the shorter response would be right in 60.0 %" in said
    assert "Always preferring" not in told(pairs, calibrated())[1]


def test_a_rater_whose_labels_the_scores_do_not_follow():
    pairs = [*random_pairs(300, rater="ann"), *random_pairs(100, seed=1, rater="bob")]
    margins = torch.ones(400)
    margins[300:370] = -1
    assert "Accuracy is lower where rater is bob: 30.0 %" in told(pairs, margins)[1]


def test_labels_that_contradict_each_other_set_a_ceiling():
    once = random_pairs(100, rater="ann")
    again = [Pair(p.prompt, p.rejected, p.chosen, columns={"rater": "bob"}) for p in once[:20]]
    again += [Pair(p.prompt, p.chosen, p.rejected, columns={"rater": "bob"}) for p in once[20:]]
    summary, said = told([*once, *again], torch.ones(200))
    assert "20 items of 100 are labelled both ways; no scores could be right about more than 90.0 %" in said
    assert "Two raters agree in 80.0 %" in said and "88.7 % of their votes" in said
    assert summary["labels"]["agreement"]["ceiling_low"] == 0.8
    assert summary["overall"]["num_clusters"] == 100


def test_models_that_disagree_where_they_are_wrong():
    generator = torch.Generator().manual_seed(0)
    noise = torch.where(torch.arange(400) % 2 == 0, 0.1, 5.0)
    margins = 1 + noise * torch.randn(3, 400, generator=generator)
    scores = torch.stack([margins, torch.zeros(3, 400)], -1).double()
    assert "Disagreement tells errors" in told(random_pairs(), margins.mean(0), models=scores)[1]
    equal = 1 + torch.randn(3, 400, generator=generator) * 0.01
    scores = torch.stack([equal, torch.zeros(3, 400)], -1).double()
    assert "does not tell where they are wrong" in told(random_pairs(), equal.mean(0), models=scores)[1]


def test_opinions_that_move_scores():
    leads = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 1.0])
    probes = torch.stack([leads.flatten(), torch.zeros(100)], -1)[None]
    summary, said = told(random_pairs(), calibrated(), probes=probes)
    assert "opinion raises the lead of the answer that agrees with it by 1.000 ± 0.000" in said
    assert summary["sycophancy"]["num"] == 50


def test_prompts_that_are_others_or_the_same():
    pairs = random_pairs(100)
    others = [[50 + n % 5] * (n % 9 + 3) for n in range(80)]
    assert "they differ by more than chance" in told(pairs, calibrated(100), reference=others)[1]
    own = [pair.prompt for pair in pairs]
    assert "100.0 % of the prompts are in the reference data" in told(pairs, calibrated(100), reference=own)[1]


def test_texts_of_the_data_are_no_html():
    pairs = [Pair([9], tiny_tokenizer()("<script>x</script>").input_ids, [30], columns={"split": "<b>"})] * 3
    text = page(told(pairs, -torch.ones(3))[0], with_plots=False)
    assert "<script" not in text and "<b>" not in text and "&lt;b&gt;" in text
    assert "&lt;script&gt;" in text


def test_names_of_columns_stay_inside_the_texts_of_plots():
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    summary, _ = told(random_pairs(4), calibrated(4))
    summary["groups"] = {'"><b>': {name: summary["overall"] for name in ("left", "right")}}
    found = Page(page(summary, with_plots=True))
    assert 'Accuracy by "><b>' in [attributes["alt"] for tag, attributes in found.tags if tag == "img"]
    assert "b" not in {tag for tag, _ in found.tags}


def test_a_figure_that_a_page_shows_and_nobody_computed_is_an_error():
    summary, _ = told(random_pairs(4), calibrated(4))
    del summary["length"]["mean_chosen"]
    with pytest.raises(jinja2.UndefinedError, match="mean_chosen"):
        page(summary, with_plots=False)


def test_one_pair_is_reported_too():
    summary, _ = told(random_pairs(1), torch.ones(1))
    assert "temperatures" not in summary["calibration"] and summary["overall"]["accuracy"] == 1
