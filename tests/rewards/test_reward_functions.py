"""Reward functions get copies of all that they are given; a misspelled name is answered with the right one."""

import asyncio
import copy

import numpy as np
import pytest
import torch
from loops import model_folder, write_rows
from tiny import tiny_tokenizer

from fastrlhf.data import Prompt
from fastrlhf.generation.engine import Sample
from fastrlhf.packing import pack
from fastrlhf.rewards.named_functions import load_function
from fastrlhf.rewards.scorer import Scorer
from fastrlhf.rewards.sources import is_model
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.trainers.ppo.trainer import PPO

NESTED = {"facts": {"list": [1, {"deep": [2]}]}, "labels": ["a", "b"], "word": "w"}


def spoils(prompts, responses, *, response_ids, finished, facts, labels, **columns):
    """A reward that changes all that it can reach, once it has made its scores."""
    scores = [float(len(ids) + len(known["list"])) for ids, known in zip(response_ids, facts, strict=True)]
    for known, names in zip(facts, labels, strict=True):
        known["list"][1]["deep"].append(9)
        known["list"].append(9)
        names.clear()
    for ids in response_ids:
        ids.append(0)
    for values in (prompts, responses, response_ids, finished, facts, labels, *columns.values()):
        values.clear()
    columns.clear()
    return scores


def keeps(prompts, responses, *, response_ids, finished, facts, labels, **columns):
    return [float(len(ids) + len(known["list"])) for ids, known in zip(response_ids, facts, strict=True)]


def test_what_a_function_changes_is_its_own():
    samples = [Sample([10], [12, 13, 14 + n], [0.0] * 3, [0.0] * 3, True) for n in range(4)]
    shared = Prompt([10], "p", copy.deepcopy(NESTED))  # one prompt, answered four times
    prompts, batch = [shared] * 4, pack([s.prompt + s.response for s in samples], prompt_lengths=[1] * 4)
    before = copy.deepcopy((prompts, samples))
    for columns in (set(NESTED), None):
        scorer = Scorer(spoils, tiny_tokenizer(), max_tokens=9, columns=columns)
        assert [scorer(prompts, samples, batch).tolist() for _ in range(2)] == [[5.0] * 4] * 2
    assert (prompts, samples) == before


def test_the_responses_to_one_prompt_have_columns_of_their_own():
    def first_changes(prompts, responses, *, labels):
        labels[0].append("c")
        return [len(names) for names in labels]

    samples = [Sample([10], [12], [0.0], [0.0], True)] * 3
    scorer = Scorer(first_changes, tiny_tokenizer(), max_tokens=9)
    scores = scorer([Prompt([10], "p", {"labels": ["a"]})] * 3, samples, pack([[10, 12]] * 3))
    assert scores.tolist() == [2, 1, 1]


def test_scores_stay_when_the_function_uses_its_tensor_again():
    buffer = torch.zeros(2, requires_grad=True)

    def counts(prompts, responses):
        buffer.data += 1
        return buffer

    samples, batch = [Sample([10], [12], [0.0], [0.0], True)] * 2, pack([[10, 12]] * 2)
    scorer = Scorer(counts, tiny_tokenizer(), max_tokens=9)
    first, second = (scorer.terms([Prompt([10], "p", {})] * 2, samples, batch)[0] for _ in range(2))
    assert first.tolist() == [1, 1] and second.tolist() == [2, 2] and not second.requires_grad


def scores_of(returned):
    """The scores of two responses by a function that returns this, or raises it."""

    def function(prompts, responses):
        if isinstance(returned, BaseException):
            raise returned
        return returned

    samples, batch = [Sample([10], [12], [0.0], [0.0], True)] * 2, pack([[10, 12]] * 2)
    return Scorer(function, tiny_tokenizer(), max_tokens=9).terms([Prompt([10], "p", {})] * 2, samples, batch)[0]


@pytest.mark.parametrize(
    "returned",
    [
        (1, 2),
        torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True),
        torch.tensor([2.0, 1.0], dtype=torch.bfloat16).flip(0),
        np.array([2.0, 1.0])[::-1],
        np.array([1.0, 2.0], dtype=">f8"),
        np.array([1, 2.0], dtype=object),
        np.frombuffer(np.array([1.0, 2.0], dtype=np.float16).tobytes(), dtype=np.float16),  # read only
        [np.float16(1), np.int8(2)],
    ],
)
def test_two_numbers_are_two_scores_whatever_holds_them(returned):
    scores = scores_of(returned)
    assert scores.tolist() == [1, 2] and scores.dtype == torch.float32 and not scores.requires_grad


@pytest.mark.parametrize(
    "returned",
    [
        None,
        ["1", "2"],
        np.array(["1", "2"]),
        torch.tensor([1j, 2]),
        torch.ones(2, device="meta"),
        torch.ones(2).to_sparse(),
        np.ma.masked_array([1.0, 2.0], [True, False]),
        (n for n in (1.0, 2.0)),
    ],
)
def test_what_are_no_two_numbers_is_shown(returned):
    with pytest.raises(TypeError, match=r"function must return 2 numbers, got "):
        scores_of(returned)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (StopIteration(), "StopIteration in line"),
        (SystemExit(0), r"SystemExit\(0\) in line"),
        (GeneratorExit(), "GeneratorExit in line"),
        (asyncio.CancelledError("late"), r"CancelledError\(late\) in line"),
    ],
)
def test_no_error_of_a_function_ends_a_run_in_silence(error, text):
    with pytest.raises(RuntimeError, match=rf"reward: .*function ended with {text} \d+ of .*\.py, without scores"):
        scores_of(error)


@pytest.mark.parametrize("error", [ValueError("theirs"), KeyboardInterrupt()])
def test_other_errors_of_a_function_are_its_own(error):
    with pytest.raises(type(error)) as caught:
        scores_of(error)
    assert caught.value is error


@pytest.mark.usefixtures("one_thread")
def test_a_run_with_a_function_that_changes_its_arguments_is_the_run_with_one_that_does_not(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": f"p{n % 3}", **NESTED, "word": f"{n}"} for n in range(4)])
    settings = {"model": model_folder(tmp_path / "m"), "data": data, "eval_data": data, "samples_every": 1}
    settings |= {"steps": 2, "batch_size": 8, "samples_per_prompt": 2, "estimator": "rloo", "max_new_tokens": 4}
    for function in (keeps, spoils):
        with PPO(PPOConfig(reward=function, output=str(tmp_path / function.__name__), **settings)) as trainer:
            list(trainer)
    for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert (tmp_path / "keeps" / name).read_bytes() == (tmp_path / "spoils" / name).read_bytes()


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "named_rules").mkdir()
    text = "import math\nfrom math import sin\ndef score(prompts, responses):\n    return [0.0] * len(responses)\n"
    (tmp_path / "named_rules" / "inner.py").write_text(text)
    (tmp_path / "outer_rules.py").write_text(text)
    (tmp_path / "failing_rules.py").write_text("import math\nmath.no_such_name\n")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("outer_rules.py:score", "names a file; a function is given by its module: write outer_rules:score"),
        ("outer_rules.py", "write outer_rules:FUNCTION"),
        ("./outer_rules.py:score", "write outer_rules:score"),
        ("named_rules/inner.py:score", "write named_rules.inner:score"),
        ("/some/where/rules.py:score", "write rules:score, with /some/where as the working folder or in PYTHONPATH"),
        ("../rules.py:score", "write rules:score, with .. as the working folder or in PYTHONPATH"),
        ("outer_rules.score", "no folder 'outer_rules.score'; write outer_rules:score"),
        ("named_rules.inner.score", "write named_rules.inner:score"),
        ("outer_rules", "no folder 'outer_rules'; write outer_rules:FUNCTION"),
        ("nowhere", "no folder 'nowhere'; a function is given as module:function"),
        ("score:outer_rules", "no module named 'score' .*; write outer_rules:score"),
        ("outer_rules:scores", "has no function 'scores'; did you mean outer_rules:score?"),
        ("outer_rules:score()", "did you mean outer_rules:score?"),
        ("outer_rules::score", "did you mean outer_rules:score?"),
        ("outer_rules:", "has no function ''; it has score$"),
        ("outer_rules:math", "outer_rules:math must be a function, got module"),
    ],
)
def test_a_name_that_is_misspelled_is_answered_with_the_right_one(module, source, words):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=words.replace("?", r"\?")):
        Scorer(source, tiny_tokenizer(), max_tokens=9)


def test_the_right_spellings_are_taken(module):
    assert load_function("outer_rules:score").__module__ == "outer_rules"
    assert load_function("named_rules.inner:score").__module__ == "named_rules.inner"
    assert not is_model("outer_rules:score") and is_model("someone/model")


def test_an_error_while_a_module_is_imported_is_its_own(module):
    with pytest.raises(AttributeError, match="no_such_name"):
        load_function("failing_rules:score")


def test_a_module_of_ours_that_moved_is_named_with_its_new_place():
    with pytest.raises(ValueError, match=r"fastrlhf.demo.gold is now fastrlhf.rewards.gold: write fastrlhf.rewards"):
        load_function("fastrlhf.demo.gold:plain_answer")
