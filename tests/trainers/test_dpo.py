"""DPO and its relatives against logits of plain transformers and formulas in float64, and the promises of a loop."""

import json
import shutil
from pathlib import Path

import mpmath
import pytest
import torch
from loops import assert_resumes_bit_for_bit, model_folder, pairs, write_rows
from tiny import ARCHITECTURES
from transformers import AutoModelForCausalLM

from fastrlhf.data import Pair
from fastrlhf.formulas.preferences import log_complement, pair_losses
from fastrlhf.models.policy import Policy
from fastrlhf.settings.training import DPOConfig
from fastrlhf.stats.accuracy import wilson_interval
from fastrlhf.trainers.dpo import DPO
from fastrlhf.trainers.packed_rows import full_sequences, pack_rows

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = [
    {},
    {"label_smoothing": 0.2, "beta": 0.3},
    {"length_normalized": True, "beta": 2.0},
    {"reference_free": True, "sft_coef": 0.5},
    {"loss": "ipo"},
    {"loss": "ipo", "length_normalized": True},
    {"loss": "hinge"},
    {"loss": "simpo", "beta": 2.0, "target_margin": 0.4},
    {"loss": "orpo", "beta": 0.3},
]


@pytest.fixture
def settings(tmp_path):
    return {
        "model": model_folder(tmp_path / "model"),
        "data": pairs(tmp_path / "data.jsonl"),
        "output": str(tmp_path / "out"),
        "template": "none",
        "max_length": 64,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "device": "cpu",
    }


def run(settings, **changes):
    return list(DPO(DPOConfig(**{**settings, **changes})))


def response_logprobs(folder, pair):
    """Of the chosen and the rejected response, by transformers, in float64."""
    model, found = AutoModelForCausalLM.from_pretrained(folder).double(), []
    for side in full_sequences(pair):
        logprobs = model(torch.tensor([side])).logits[0, :-1].log_softmax(-1)
        found.append(logprobs.gather(1, torch.tensor(side[1:])[:, None])[len(pair.prompt) - 1 :, 0].detach())
    return found


def loss_of_paper(config, policy, reference):
    """The loss of a pair, from float64 log-probabilities of its responses' tokens."""
    means = config.length_normalized or config.loss in ("simpo", "orpo")
    free = config.reference_free or config.loss in ("simpo", "orpo")
    x = [p.sum() - (0 if free else r.sum()) for p, r in zip(policy, reference, strict=True)]
    x = [(value / len(p) if means else value).item() for value, p in zip(x, policy, strict=True)]
    h = mpmath.mpf(x[0]) - x[1]
    if config.loss == "sigmoid":
        right = 1 / (1 + mpmath.exp(-config.beta * h))
        loss = -(1 - config.label_smoothing) * mpmath.log(right) - config.label_smoothing * mpmath.log(1 - right)
    elif config.loss == "ipo":
        loss = (h - 1 / (2 * mpmath.mpf(config.beta))) ** 2
    elif config.loss == "hinge":
        loss = max(0, 1 - config.beta * h)
    elif config.loss == "simpo":
        loss = mpmath.log(1 + mpmath.exp(config.target_margin - config.beta * h))
    else:
        odds = [mpmath.exp(value) / (1 - mpmath.exp(value)) for value in x]
        loss = -x[0] + config.beta * mpmath.log(1 + odds[1] / odds[0])
    return float(loss) - config.sft_coef * policy[0].mean().item()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_loss_is_that_of_the_paper_on_transformers_logits(settings, tmp_path, variant):
    if not variant.get("reference_free") and variant.get("loss") not in ("simpo", "orpo"):
        torch.manual_seed(7)
        variant = {**variant, "reference": model_folder(tmp_path / "reference")}
    loop = DPO(DPOConfig(**{**settings, **variant, "limit": 12, "batch_size": 12}))
    found = [response_logprobs(settings["model"], pair) for pair in loop.rows]
    reference = [response_logprobs(variant.get("reference", settings["model"]), pair) for pair in loop.rows]
    losses = [loss_of_paper(loop.config, p, r) for p, r in zip(found, reference, strict=True)]
    metrics = next(loop)
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=2e-5)
    sums = torch.tensor([[side.sum() for side in both] for both in found]).mean(0)
    assert [metrics["chosen_logprobs"], metrics["rejected_logprobs"]] == pytest.approx(sums.tolist(), rel=1e-5)


@pytest.mark.parametrize("variant", [{}, {"loss": "orpo", "sft_coef": 0.5}], ids=str)
def test_a_pair_of_preference_p_is_p_of_it_and_the_rest_of_its_opposite(settings, tmp_path, variant):
    options = {**settings, **variant, "batch_size": 3, "max_tokens": 30, "reference_free": not variant}
    row = {"prompt": "ab", "chosen": "xxa", "rejected": "yyabb"}
    swapped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    soft = [{**row, "preference": 0.3, "weight": 2.0}, row, {**swapped, "weight": 0.0}]
    losses = []
    for name, rows in (("soft", soft), ("one", [row]), ("other", [swapped])):
        data = write_rows(tmp_path / f"{name}.jsonl", rows)
        losses.append(next(DPO(DPOConfig(**{**options, "data": data, "output": str(tmp_path / name)})))["loss"])
    assert losses[0] == pytest.approx((2 * (0.3 * losses[1] + 0.7 * losses[2]) + losses[1]) / 3, rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_gradient_of_a_loss_is_that_of_its_formula(settings, variant):
    config = DPOConfig(**{**settings, **variant})
    names = ("loss", "beta", "label_smoothing", "target_margin")
    options = {name: getattr(config, name) for name in names}
    chosen, rejected = (-torch.rand(2, 6, dtype=torch.float64) * 3 - 0.01).requires_grad_().unbind()
    assert torch.autograd.gradcheck(lambda *x: pair_losses(*x, **options), (chosen, rejected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_logarithm_of_a_complement_keeps_its_digits(dtype):
    x = torch.tensor([-1e-5, -0.01, -0.6, -0.7, -3.0, -20.0, -80.0], dtype=dtype)
    with mpmath.workdps(60):
        expected = [float(mpmath.log(1 - mpmath.exp(mpmath.mpf(value)))) for value in x.tolist()]
    torch.testing.assert_close(log_complement(x).tolist(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)
    assert log_complement(torch.zeros(1, dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_prompt_read_once_gives_the_log_probabilities_of_reading_it_twice(arch, tmp_path):
    policy = Policy.from_pretrained(model_folder(tmp_path, arch=arch))
    some = [
        Pair([5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [15, 16], [17, 18, 19]),
        Pair([], [20, 21], [22, 23]),
        Pair([5], [6], [7]),
    ]
    results = []
    for share in (False, True):
        batch = pack_rows(some, share_prompts=share, device=torch.device("cpu"))
        assert batch.num_tokens == (22 if share else 33)
        parts = [batch, *batch.microbatches(1, together=2)]
        whole, *cut = (policy(part) for part in parts)
        torch.testing.assert_close(torch.cat(cut), whole, rtol=1e-5, atol=1e-6)
        (whole * torch.arange(1, len(whole) + 1)).sum().backward()
        results.append([whole.detach(), *(p.grad for p in policy.parameters())])
        policy.zero_grad()
    for twice, once in zip(*results, strict=True):
        torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", [{}, {"loss": "ipo"}, {"loss": "orpo"}], ids=str)
def test_microbatches_do_not_change_the_result(settings, tmp_path, variant):
    whole = run(settings, output=str(tmp_path / "a"), max_tokens=10_000, **variant)
    parts = run(settings, output=str(tmp_path / "b"), max_tokens=1, **variant)
    for a, b in zip(whole, parts, strict=True):
        for name in ("loss", "accuracy", "margin", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("variant", [{}, {"loss": "simpo", "beta": 2.0}], ids=str)
def test_it_learns_which_responses_are_better(settings, variant):
    metrics = run(settings, epochs=6, eval_fraction=0.25, learning_rate=3e-3, **variant)
    assert metrics[0].get("eval/accuracy") is None and metrics[-1]["eval/num_pairs"] == 12
    assert metrics[-1]["eval/accuracy"] >= 0.9 and metrics[-1]["eval/loss"] < 0.5
    assert metrics[-1]["eval/accuracy_low"] < metrics[-1]["eval/accuracy"] <= metrics[-1]["eval/accuracy_high"]


def test_before_the_first_update_policy_and_reference_agree(settings):
    first = run(settings, batch_size=48)[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and first["margin"] == pytest.approx(0, abs=1e-4)


def test_the_reference_of_an_adapter_is_the_model_without_it(settings, tmp_path):
    metrics = run(settings, lora_rank=4, learning_rate=1e-2, epochs=3, save_every=4)
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-4) and metrics[-1]["accuracy"] > 0.8
    loop = DPO(DPOConfig(**{**settings, "lora_rank": 4, "output": str(tmp_path / "again")}))
    plain = DPO(DPOConfig(**{**settings, "output": str(tmp_path / "plain")}))
    torch.testing.assert_close(loop.reference_logprobs, plain.reference_logprobs)


def test_resume_is_exact_and_needs_no_reference(settings, tmp_path):
    reference = model_folder(tmp_path / "reference")
    options = {**settings, "reference": reference, "save_every": 2, "eval_fraction": 0.2}
    assert_resumes_bit_for_bit(DPO, DPOConfig, options, tmp_path, killed_after=3)
    shutil.rmtree(reference)
    killed = {**options, "output": str(tmp_path / "killed"), "resume": True}
    shutil.rmtree(Path(killed["output"]) / "model")
    assert list(DPO(DPOConfig(**killed))) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"loss": "dpo"}, "loss must be one of sigmoid, ipo, hinge, simpo, orpo"),
        ({"beta": 0}, "beta must be above 0"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing has no effect on loss ipo"),
        ({"target_margin": 0.1}, "target_margin has no effect on loss sigmoid"),
        ({"loss": "orpo", "reference": "x"}, "loss orpo has no reference"),
        ({"reference": "x", "reference_free": True}, "give reference .x. or reference_free"),
        ({"label_smoothing": 0.6}, "label_smoothing must be between 0 and 0.5"),
    ],
)
def test_options_that_do_not_fit_are_refused(settings, changes, text):
    with pytest.raises(ValueError, match=text):
        DPOConfig(**{**settings, **changes})


def test_a_reference_with_another_vocabulary_is_refused(settings, tmp_path):
    other = model_folder(tmp_path / "other")
    tokenizer = json.loads(Path(other, "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    Path(other, "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=f"reference {other}"):
        DPO(DPOConfig(**settings, reference=other))


def test_columns_that_only_reward_models_use_are_told(settings, tmp_path, capsys):
    for column in ({"head": "kind"}, {"margin": 1.0}):
        plain = {"prompt": "a", "chosen": "x", "rejected": "y", **column}
        file = write_rows(tmp_path / "soft.jsonl", [plain] * 3)
        DPO(DPOConfig(**{**settings, "data": file, "overwrite": True}))
        assert "columns not used (they are for reward models): margin, head" in capsys.readouterr().out


@pytest.mark.parametrize("variant", [{}, {"loss": "simpo", "beta": 2.0}], ids=str)
def test_held_out_judgements_written_the_other_way_round_have_the_same_accuracy(settings, tmp_path, variant):
    """Three pairs on a prompt are as many trials as their results are worth, by arithmetic on transformers' logits."""
    rows = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()][:24]
    rows = [{**row, "prompt": f"p{n // 3}"} for n, row in enumerate(rows)]
    for n in (0, 1, 2, 7, 9):  # against what it trains on
        rows[n]["chosen"], rows[n]["rejected"] = rows[n]["rejected"], rows[n]["chosen"]
    turned = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"], "preference": 0.2} if n % 2 else row
        for n, row in enumerate(rows)
    ]
    undecided = [*turned, {**rows[0], "preference": 0.5}]
    found = []
    for name, given in (("straight", rows), ("turned", turned), ("undecided", undecided)):
        held_out = write_rows(tmp_path / f"{name}.jsonl", given)
        changes = {"eval_data": held_out, "output": str(tmp_path / name)}
        loop = DPO(DPOConfig(**{**settings, **variant, **changes}))
        next(loop)
        found.append({key.removeprefix("eval/"): value for key, value in loop.evaluate().items()})
    keys = ("accuracy", "accuracy_low", "accuracy_high", "num_pairs", "ties")
    first, *others = ([each[key] for key in keys] for each in found)
    assert all(other == first for other in others) and first[3] == 24
    loop.save(tmp_path / "policy")
    policy = [response_logprobs(tmp_path / "policy", pair) for pair in loop.held_out[:24]]
    base = [response_logprobs(settings["model"], pair) for pair in loop.held_out[:24]]
    if variant:  # means without a reference
        leads = [(p[0].mean() - p[1].mean()).item() for p in policy]
    else:
        leads = [(p[0].sum() - r[0].sum() - p[1].sum() + r[1].sum()).item() for p, r in zip(policy, base, strict=True)]
    right = [(lead > 0) == (pair.preference > 0.5) for lead, pair in zip(leads, loop.held_out, strict=False)]
    share = sum(right) / 24
    deviations = [sum(right[n : n + 3]) - 3 * share for n in range(0, 24, 3)]
    trials = min(1 + 7 / 8 * share * (1 - share) * 24**2 / sum(d * d for d in deviations), 24)
    assert 0 < share < 1 and first[:3] == pytest.approx([share, *wilson_interval(share, trials)])
