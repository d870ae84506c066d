"""KTO against logits of plain transformers and the paper's formula in float64, and the promises of a loop."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from compare import filled
from loops import assert_resumes_bit_for_bit, model_folder, word, write_rows
from transformers import AutoModelForCausalLM

from fastrlhf.data import Labelled
from fastrlhf.errors import DataError
from fastrlhf.formulas.preferences import labelled_losses
from fastrlhf.settings.training import DPOConfig, KTOConfig
from fastrlhf.trainers.dpo import DPO
from fastrlhf.trainers.kto import KTO, mismatched, preference_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def labelled(path, num=48):
    """Wanted responses have the letter x, the others y; all are as long."""
    rng = random.Random(0)
    rows = [
        {"prompt": word(rng, "abcd", 8), "completion": word(rng, "yyyab" if n % 3 else "xxxab", 5), "label": n % 3 == 0}
        for n in range(num)
    ]
    return write_rows(path, rows)


@pytest.fixture
def settings(tmp_path):
    return {
        "model": model_folder(tmp_path / "model"),
        "data": labelled(tmp_path / "data.jsonl"),
        "output": str(tmp_path / "out"),
        "loss": "kto",
        "template": "none",
        "max_length": 64,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "device": "cpu",
        "save_every": 0,
    }


def ratios(policy, reference, prompts, responses):
    """Differences of the log-probabilities of responses, by transformers, in float64."""
    sums = []
    for folder in (policy, reference):
        model = AutoModelForCausalLM.from_pretrained(folder).double()
        for prompt, response in zip(prompts, responses, strict=True):
            logprobs = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            sums.append(logprobs.gather(1, torch.tensor(response)[:, None]).sum().item())
    return [a - b for a, b in zip(sums[: len(prompts)], sums[len(prompts) :], strict=True)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_loss_is_that_of_the_paper_on_transformers_logits(settings, tmp_path):
    """With each of two models as the other's reference, so that an estimate of the divergence is positive."""
    torch.manual_seed(7)
    models = [settings["model"], model_folder(tmp_path / "reference")]
    kls = [check_first_loss({**settings, "output": str(tmp_path / "a")}, *models)]
    kls.append(check_first_loss({**settings, "output": str(tmp_path / "b")}, *models[::-1]))
    assert max(kls) > 0.01


def check_first_loss(settings, policy, reference):
    options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5, "limit": 12, "batch_size": 12}
    loop = KTO(DPOConfig(**{**settings, "model": policy, "reference": reference, **options, "max_tokens": 30}))
    prompts, responses = [row.prompt for row in loop.rows], [row.response for row in loop.rows]
    found = ratios(policy, reference, prompts, responses)
    kl = max(0, sum(ratios(policy, reference, prompts, responses[-1:] + responses[:-1])) / 12)
    losses = [
        1.5 * (1 - sigmoid(0.3 * (r - kl))) if row.label == 1 else 0.5 * (1 - sigmoid(0.3 * (kl - r)))
        for r, row in zip(found, loop.rows, strict=True)
    ]
    metrics = next(loop)
    assert metrics["loss"] == pytest.approx(sum(losses) / 12, rel=2e-5)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-4)
    return kl


def test_the_gradient_is_that_of_the_formula_and_none_goes_through_the_divergence(settings):
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1.0, 0.0, 0.3, 1.0, 0.0, 1.0], dtype=torch.float64)
    kl = torch.tensor(0.4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: labelled_losses(x, labels, kl, beta=0.7, desirable_weight=1.3), x)
    loop = KTO(DPOConfig(**settings))
    assert not loop.kl("rows", [0, 1, 2], 1000).requires_grad


def test_a_prompt_gets_the_response_to_another_prompt():
    rows = [Labelled([1], [2], 1.0), Labelled([1], [3], 0.0), Labelled([4], [5, 6, 7], 1.0), Labelled([4], [8], 1.0)]
    found = mismatched(rows, 4)
    assert [row.prompt for row in found] == [[1], [1], [4], [4]]
    assert [row.response for row in found] == [[8], [8], [3], [3]]
    assert mismatched(rows[:3], 4)[0].response == [5, 6, 7]
    with pytest.raises(ValueError, match=r"no response to another prompt makes with the prompt of row 1 .* at most 3"):
        mismatched(rows[:3], 3)


def test_a_held_out_row_without_another_prompt_is_named(settings):
    with pytest.raises(ValueError, match="the prompt of row 1 of the held-out rows"):
        KTO(DPOConfig(**{**settings, "eval_fraction": 1 / 48}))


def test_microbatches_do_not_change_the_result(settings, tmp_path):
    options = {"save_every": 0, "eval_fraction": 0.25, "epochs": 2}
    both = [
        list(KTO(DPOConfig(**{**settings, **options, "output": str(tmp_path / str(n)), "max_tokens": n})))
        for n in (1, 10_000)
    ]
    for parts, whole in filled(zip(*both, strict=True)):
        assert parts == pytest.approx(whole, rel=1e-3, abs=1e-4)


def test_it_learns_which_responses_are_wanted(settings):
    metrics = list(
        preference_trainer(DPOConfig(**{**settings, "learning_rate": 3e-3, "epochs": 6, "eval_fraction": 0.25}))
    )
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-4) and metrics[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert metrics[-1]["eval/accuracy"] > 0.9 and metrics[-1]["eval/wanted"] > 0 > metrics[-1]["eval/unwanted"]


def test_a_killed_run_resumes_bit_for_bit(settings, tmp_path):
    options = {**settings, "save_every": 2, "eval_fraction": 0.25}
    assert_resumes_bit_for_bit(KTO, DPOConfig, options, tmp_path, killed_after=3)


@pytest.mark.parametrize("row", [0, -1], ids=["trained on", "held out"])
def test_a_run_is_not_resumed_on_other_labels(settings, row):
    settings |= {"save_every": 1, "eval_fraction": 0.25}
    next(KTO(DPOConfig(**settings)))
    lines = Path(settings["data"]).read_text().splitlines()
    changed = {**json.loads(lines[row]), "label": 0.5}
    lines[row] = json.dumps(changed)
    Path(settings["data"]).write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"resume: data: .*data.jsonl has changed since the run began"):
        KTO(DPOConfig(**settings, resume=True))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"reference_free": True}, "loss kto has none of reference_free"),
        (
            {"loss": "ipo", "desirable_weight": 2.0},
            "desirable_weight and undesirable_weight have no effect on loss ipo",
        ),
        ({"desirable_weight": -1.0}, "desirable_weight must be at least 0"),
        ({"label_smoothing": 0.1}, "label_smoothing has no effect on loss kto"),
    ],
)
def test_options_that_do_not_fit_are_refused(settings, changes, text):
    with pytest.raises(ValueError, match=text):
        DPOConfig(**{**settings, **changes})


def test_settings_of_its_own_are_those_of_dpo_with_loss_kto(settings, tmp_path):
    options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5, "limit": 16}
    metrics = [list(KTO(DPOConfig(**{**settings, **options})))]
    own = {name: value for name, value in settings.items() if name != "loss"}
    metrics.append(list(KTO(KTOConfig(**{**own, **options, "output": str(tmp_path / "own")}))))
    assert metrics[0] == metrics[1]
    with pytest.raises(TypeError, match="unexpected keyword argument 'reference_free'"):
        KTOConfig(**own, reference_free=True)


def test_a_loss_of_the_other_kind_of_rows_is_refused(settings):
    with pytest.raises(ValueError, match=r"loss kto is of labelled responses: fastrlhf.KTO"):
        DPO(DPOConfig(**settings))
    with pytest.raises(ValueError, match=r"loss ipo is of pairs: fastrlhf.DPO"):
        KTO(DPOConfig(**{**settings, "loss": "ipo"}))


def test_labelled_responses_under_a_loss_of_pairs_are_pointed_to_kto(settings):
    with pytest.raises(DataError, match="kto reads labelled responses"):
        DPO(DPOConfig(**{**settings, "loss": "sigmoid"}))
