import math

import pytest
import torch
import torch.nn.functional as F
from loops import assert_resumes_bit_for_bit, model_folder, pairs, write_rows
from tiny import ARCHITECTURES, tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastrlhf.data import Pair
from fastrlhf.errors import NonFiniteError
from fastrlhf.models.policy import Policy, RewardModel, load_causal_lm
from fastrlhf.models.shared_prompts import can_share_prompts
from fastrlhf.packing import pack
from fastrlhf.settings.training import RewardConfig
from fastrlhf.trainers.packed_rows import full_sequences, pack_rows
from fastrlhf.trainers.reward import RewardTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(tmp_path):
    return {
        "model": model_folder(tmp_path / "model"),
        "data": pairs(tmp_path / "data.jsonl"),
        "output": str(tmp_path / "out"),
        "template": "none",
        "max_length": 64,
        "batch_size": 8,
        "device": "cpu",
    }


def test_prompts_read_once_or_for_each_response_give_the_same_steps(settings, tmp_path):
    once, each = (
        RewardTrainer(RewardConfig(**settings | {"output": str(tmp_path / name), "share_prompts": name == "once"}))
        for name in ("once", "each")
    )
    assert sum(map(once.num_forward_tokens, once.rows)) < sum(map(each.num_forward_tokens, each.rows))
    for ours, theirs in zip(once, each, strict=True):
        for name in ("loss", "grad_norm", "num_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def run(settings, **changes):
    return list(RewardTrainer(RewardConfig(**{**settings, **changes})))


def test_loss_is_that_of_transformers_scores(settings):
    """On one batch of all pairs, against the padded scores of AutoModelForSequenceClassification."""
    loop = RewardTrainer(RewardConfig(**{**settings, "batch_size": 48}))
    loop.save(settings["output"] + "/start")
    model = AutoModelForSequenceClassification.from_pretrained(settings["output"] + "/start")
    scores = []
    for pair in loop.rows:
        longest = max(map(len, full_sequences(pair)))
        ids = torch.tensor([side + [0] * (longest - len(side)) for side in full_sequences(pair)])
        scores.append(model(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, 0].detach())
    chosen, rejected = torch.stack(scores).unbind(1)
    metrics = next(loop)
    assert metrics["loss"] == pytest.approx(-F.logsigmoid(chosen - rejected).mean().item(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert metrics["chosen"] == pytest.approx(chosen.mean().item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 60])
def test_microbatches_do_not_change_the_result(settings, tmp_path, max_tokens):
    options = {"learning_rate": 1e-3, "center_coef": 0.01, "label_smoothing": 0.1}
    whole = run(settings, output=str(tmp_path / "a"), max_tokens=10_000, **options)
    parts = run(settings, output=str(tmp_path / "b"), max_tokens=max_tokens, **options)
    for a, b in zip(whole, parts, strict=True):
        for name in ("loss", "accuracy", "margin", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_prompt_read_once_gives_the_scores_and_gradients_of_reading_it_twice(arch, tmp_path):
    model = RewardModel.from_pretrained(model_folder(tmp_path, arch=arch), new_head=True)
    pairs = [
        Pair([5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [15, 16], [17, 18, 19]),
        Pair([], [20, 21], [22]),
        Pair([5], [6], [7]),
    ]
    results = []
    for share in (False, True):
        batch = pack_rows(pairs, share_prompts=share, as_responses=False, device=torch.device("cpu"))
        assert batch.num_tokens == (21 if share else 32)
        scores = model(batch)
        (scores * torch.arange(1, 7)).sum().backward()
        results.append([scores.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad()
    for twice, once in zip(*results, strict=True):
        torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)


def test_prompts_are_read_twice_where_more_than_attention_mixes_tokens(capsys):
    class SumsWhatItSees:
        autocast, model = None, tiny_model()

        def hidden(self, batch, rows):
            return torch.cat([part.double().cumsum(0) for part in batch.tokens.split(batch.lengths)])[rows, None]

    assert not can_share_prompts(SumsWhatItSees(), torch.device("cpu"))
    assert "LlamaForCausalLM: prompts are read with each response" in capsys.readouterr().out


@pytest.mark.parametrize("vocab", [2, 5])
def test_prompts_are_read_once_by_a_model_of_few_tokens_too(vocab):
    assert can_share_prompts(Policy(load_causal_lm(tiny_model(vocab=vocab))), torch.device("cpu"))


def test_it_learns_separable_pairs(settings):
    metrics = run(settings, epochs=6, learning_rate=5e-3, eval_fraction=0.5)[-1]
    assert metrics["eval/accuracy"] > 0.9
    assert 0.8 < metrics["eval/accuracy_low"] < metrics["eval/accuracy"]
    assert metrics["eval/num_pairs"] == 24


def test_chosen_responses_score_0_on_average_at_the_end(settings):
    loop = RewardTrainer(RewardConfig(**settings, learning_rate=1e-3))
    *_, last = loop
    model = RewardModel.from_pretrained(settings["output"] + "/model")
    scores = torch.cat([model(pack([full_sequences(pair)[0]])) for pair in loop.rows])
    assert abs(scores.mean().item()) < 1e-5
    assert last["reward_bias"] == model.bias != 0
    assert "reward_bias" not in run(settings, center_bias=False, overwrite=True)[-1]


def test_the_response_that_raters_preferred_scores_0_whichever_side_it_is_on(settings, tmp_path):
    rows = [{"prompt": "a", "chosen": f"x{n}", "rejected": f"y{n}", "preference": n % 2} for n in range(8)]
    loop = RewardTrainer(RewardConfig(**{**settings, "data": write_rows(tmp_path / "both.jsonl", rows)}))
    list(loop)
    scores = [loop.model(pack([full_sequences(pair)[int(pair.preference == 0)]])) for pair in loop.rows]
    assert abs(torch.cat(scores).mean().item()) < 1e-5


def test_the_model_folder_is_plain_transformers(settings):
    loop = RewardTrainer(RewardConfig(**settings))
    *_, last = loop
    folder = settings["output"] + "/model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chosen, _ = full_sequences(loop.rows[0])
    theirs = model(input_ids=torch.tensor([chosen])).logits.item() + last["reward_bias"]
    assert loop.model(pack([chosen])).item() == pytest.approx(theirs, abs=1e-5)
    assert tokenizer.eos_token_id == chosen[-1]


def test_plain_transformers_scores_a_padded_batch_alike_though_the_pad_was_the_eos(settings, tmp_path):
    loop = RewardTrainer(RewardConfig(**{**settings, "model": model_folder(tmp_path / "other", pad_is_eos=True)}))
    loop.save(tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    both = list(full_sequences(loop.rows[0]))
    batch = tokenizer.pad({"input_ids": both}, return_tensors="pt")
    torch.testing.assert_close(model(**batch).logits[:, 0], loop.model(pack(both)), rtol=1e-4, atol=1e-5)


def test_margins_move_the_loss(settings, tmp_path):
    row = {"prompt": "a", "chosen": "xx", "rejected": "yy"}
    losses = []
    for margin in (0.0, 2.0):
        file = write_rows(tmp_path / f"{margin}.jsonl", [{**row, "margin": margin}])
        (metrics,) = run(settings, data=file, output=str(tmp_path / f"out{margin}"))
        losses.append(metrics)
    gap = losses[0]["margin"]
    assert losses[0]["loss"] == pytest.approx(math.log1p(math.exp(-gap)), rel=1e-5)
    assert losses[1]["loss"] == pytest.approx(math.log1p(math.exp(2 - gap)), rel=1e-5)


def test_ties_count_one_half_and_are_shown(settings):
    loop = RewardTrainer(RewardConfig(**settings, eval_fraction=0.25))
    torch.nn.init.zeros_(loop.model.model.score.weight)
    result = loop.evaluate()
    assert (result["eval/accuracy"], result["eval/ties"], result["eval/num_pairs"]) == (0.5, 12, 12)


def test_a_killed_run_resumes_bit_for_bit(settings, tmp_path):
    settings |= {"save_every": 2, "learning_rate": 1e-3, "eval_fraction": 0.25, "max_tokens": 100}
    assert_resumes_bit_for_bit(RewardTrainer, RewardConfig, settings, tmp_path, killed_after=3)


def test_nan_stops_and_names_step_and_rows(settings):
    loop = RewardTrainer(RewardConfig(**settings))
    with torch.no_grad():
        loop.model.model.score.weight[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"at step 1, rows \[.*there is no checkpoint yet"):
        next(loop)


def test_equal_sides_are_rejected_with_their_count(settings, tmp_path):
    rows = [{"prompt": "a", "chosen": "x", "rejected": "x"}, {"prompt": "a", "chosen": "x", "rejected": "y"}]
    file = write_rows(tmp_path / "equal.jsonl", rows)
    with pytest.raises(ValueError, match=r"1 of 2 rows rejected.*\n.*\n.*chosen and rejected are the same"):
        RewardTrainer(RewardConfig(**{**settings, "data": file}))
    assert len(RewardTrainer(RewardConfig(**{**settings, "data": file, "max_rejected": 0.5})).rows) == 1


def test_a_reward_model_can_be_trained_further(settings, tmp_path):
    run(settings, learning_rate=1e-3)
    folder = settings["output"] + "/model"
    again = RewardTrainer(RewardConfig(**{**settings, "model": folder, "output": str(tmp_path / "more")}))
    assert torch.equal(again.model.model.score.weight, RewardModel.from_pretrained(folder).model.score.weight)
