import math

import numpy as np
import pytest
import torch
from compare import filled
from talks import mistral, sentencepiece_like
from tiny import tiny_model, tiny_tokenizer

from benchmarks.loops import task
from fastrlhf.data import Prompt
from fastrlhf.evaluation.answers import (
    answer,
    best_of_n,
    best_of_n_kl,
    calibration,
    compare,
    kl_of_responses,
    response_texts,
)
from fastrlhf.evaluation.labels import label_pairs
from fastrlhf.generation.engine import Sampling
from fastrlhf.models.policy import Policy
from fastrlhf.rewards.scorer import Scorer
from fastrlhf.stats.means import Mean

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def policies(tmp_path):
    """Two tiny policies that differ."""
    made = []
    for n in range(2):
        torch.manual_seed(n)
        tiny_model().save_pretrained(tmp_path / str(n))
        made.append(Policy.from_pretrained(tmp_path / str(n), freeze=True))
    return made


def answers_of(policy, tokenizer, num=6, max_new_tokens=5):
    def length(prompts, responses, **columns):
        return [len(ids) for ids in columns["response_ids"]]

    def reward(prompts, responses, **columns):
        return [ids[0] / 100 for ids in columns["response_ids"]]

    prompts = [Prompt(tokenizer(f"prompt {n}").input_ids, f"prompt {n}", {}) for n in range(num)]
    judges = {name: Scorer(f, tokenizer, max_tokens=64) for name, f in (("gold", reward), ("length", length))}
    return answer(policy, tokenizer, prompts, judges, sampling=Sampling(max_new_tokens), seeds=range(num))


def test_mean_and_standard_error_are_those_of_numpy():
    values = np.random.default_rng(0).normal(0.3, 2.0, 50)
    result = Mean.of(torch.from_numpy(values))
    assert result.mean == pytest.approx(values.mean())
    assert result.error == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert (result.num, result.z_score) == (50, pytest.approx(result.mean / result.error))


def test_a_mean_of_one_value_has_no_finite_error_and_equal_values_have_none():
    assert math.isnan(Mean.of(torch.tensor([2.0])).error) and str(Mean.of(torch.tensor([2.0]))) == "2.000 ± ?"
    assert Mean.of(torch.full((4,), 2.0)).z_score == math.inf
    assert Mean.of(torch.zeros(4)).z_score == 0.0


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_best_of_n_kl_is_the_kl_of_a_maximum_of_n_uniforms(n):
    # the largest of n draws from U(0, 1) has density n u^(n-1), so its KL to U(0, 1) is the mean of log(n u^(n-1))
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = n * u ** (n - 1)
    assert best_of_n_kl(n) == pytest.approx((density * density.log()).mean().item(), abs=1e-4)


def test_best_of_n_takes_the_gold_reward_of_the_best_score():
    scores, gold = torch.tensor([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0]]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert best_of_n(scores, gold).tolist() == [2.0, 4.0]


def test_a_model_that_knows_the_probabilities_is_calibrated():
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(4000, 2, generator=generator)
    first_wins = torch.rand(4000, generator=generator) < (scores[:, 0] - scores[:, 1]).sigmoid()
    result = calibration(scores, torch.stack([first_wins, ~first_wins], 1).float(), num_bins=5)
    assert sum(result.counts) == 4000
    assert result.observed == pytest.approx(result.predicted, abs=0.04)
    assert result.predicted == sorted(result.predicted)


def test_calibration_leaves_out_pairs_that_gold_ties():
    scores, gold = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    result = calibration(scores, gold, num_bins=5)
    assert result.counts == [1, 1] and result.observed == [0.0, 0.0]


def test_kl_of_responses_is_the_difference_of_transformers_log_probabilities(policies, tokenizer):
    policy, reference = policies
    answers = answers_of(policy, tokenizer)
    kl = kl_of_responses(policy, reference, answers, temperature=1.0, max_tokens=20)

    def logprob(model, sample):
        from transformers import AutoModelForCausalLM

        plain = AutoModelForCausalLM.from_pretrained(model.model.name_or_path)
        ids = torch.tensor([sample.prompt + sample.response])
        logprobs = plain(ids).logits[0].double().log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        return logprobs[len(sample.prompt) - 1 :].sum().item()

    expected = [logprob(policy, s) - logprob(reference, s) for s in answers.samples]
    assert kl.tolist() == pytest.approx(expected, abs=1e-4)
    assert kl_of_responses(policy, policy, answers, temperature=1.0, max_tokens=20).abs().max() == 0


def test_answers_with_the_same_seeds_are_the_same_and_the_summary_says_so(policies, tokenizer):
    policy, other = policies
    before, again, after = (answers_of(p, tokenizer) for p in (policy, policy, other))
    assert before.texts == again.texts
    same = compare(before, again, torch.zeros(6), num_prompts=6)
    assert same["gold"]["difference"] == {"mean": 0.0, "error": 0.0, "num": 6}
    summary = compare(before, after, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), num_prompts=6)
    assert summary["kl"]["mean"] == 3.5
    assert summary["gold"]["difference"]["mean"] == pytest.approx(
        summary["gold"]["after"]["mean"] - summary["gold"]["before"]["mean"], abs=1e-6
    )
    assert summary["length_after"] == pytest.approx(summary["length"]["after"]["mean"])


def test_a_policy_with_an_adapter_answers_with_it(policies, tokenizer):
    plain = answers_of(policies[0], tokenizer)
    policy = policies[0].adapt(None, rank=4, alpha=8.0, targets="all")
    for parameter in policy.adapter.parameters():
        torch.nn.init.normal_(parameter)
    answers = answers_of(policy, tokenizer)
    sampled = torch.tensor([value for sample in answers.samples for value in sample.logprobs])
    torch.testing.assert_close(sampled, policy(answers.batch), atol=1e-4, rtol=1e-4)
    assert answers.texts != plain.texts


@pytest.mark.parametrize("name", ["words", "like", "mistral"])
def test_a_prompt_and_the_text_of_a_response_are_encoded_as_the_tokens_that_were_sampled(tmp_path, name):
    make = {"words": lambda: task.words(30), "like": sentencepiece_like, "mistral": lambda: mistral(tmp_path)}[name]
    tokenizer = make()
    texts = [("a", " Blue a"), ("a ", "Blue"), ("a:\n", "Blue"), ("a", "Blue"), ("a", "  Blue")]
    for prompt, response in filled([("3 5", " 7 8")] if name == "words" else texts):
        whole = tokenizer(prompt + response).input_ids
        start = tokenizer(prompt).input_ids
        if whole[: len(start)] != start:  # no prompt of a sample: a token lies across the border
            continue
        (text,) = response_texts(tokenizer, [start], [whole[len(start) :]])
        assert tokenizer(prompt + text).input_ids == whole
        (ended,) = response_texts(tokenizer, [start], [[*whole[len(start) :], tokenizer.eos_token_id]])
        assert ended == text


def test_behind_a_special_token_the_text_of_a_response_is_its_own():
    tokenizer = sentencepiece_like()
    response = tokenizer("Blue").input_ids
    assert response_texts(tokenizer, [[*tokenizer("a").input_ids, tokenizer.bos_token_id]], [response]) == ["Blue"]


def test_labels_follow_gold_and_useless_pairs_are_counted(policies, tokenizer):
    answers = answers_of(policies[0], tokenizer, num=8)
    answers.judgements["gold"] = torch.tensor([1.0, 2.0, 3.0, 3.0, 5.0, 4.0, 1.0, 0.0])
    answers.texts[:] = ["bad", "good", "same", "same", "good", "bad", "fine", " "]
    rows, counts = label_pairs(answers, ["p", "q", "r", "s"])
    assert counts == {"pairs": 4, "ties": 1, "empty": 1, "kept": 2}
    assert [row and (row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [
        ("p", "good", "bad"),
        None,
        ("r", "good", "bad"),
        None,
    ]
    assert (rows[0]["gold_chosen"], rows[0]["chosen_finished"]) == (2.0, answers.samples[1].finished)
    with pytest.raises(ValueError, match="expected 2 answers to each of 3 prompts, got 8"):
        label_pairs(answers, ["p", "q", "r"])
