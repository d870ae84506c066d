"""Best-of-n: the estimator against all choices of k, the files, and a run that was stopped."""

import importlib
import itertools
import json

import numpy as np
import pytest
import torch
from loops import write_rows
from searches import arguments, search_settings

from fastrlhf.cli.main import main
from fastrlhf.commands.best_of_n import best_of_k, curve
from fastrlhf.evaluation.answers import best_of_n, best_of_n_kl
from fastrlhf.runtime.jsonl import read_jsonl
from fastrlhf.settings.best_of_n import BestOfNConfig
from fastrlhf.settings.training import SFTConfig
from fastrlhf.stats.means import Mean
from fastrlhf.trainers.sft import SFT


@pytest.mark.parametrize("n", [1, 2, 7])
def test_best_of_k_is_the_mean_over_all_choices_of_k(n):
    rng = np.random.default_rng(n)
    scores, values = rng.normal(size=(2, 3, n))
    expected = np.empty((3, n))
    for prompt, k in itertools.product(range(3), range(1, n + 1)):
        choices = itertools.combinations(range(n), k)
        expected[prompt, k - 1] = np.mean([values[prompt, max(c, key=scores[prompt].__getitem__)] for c in choices])
    found = best_of_k(torch.from_numpy(scores), torch.from_numpy(values))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_of_equal_scores_the_first_is_the_best():
    scores, values = torch.tensor([[1.0, 3.0, 3.0, 2.0]]), torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    assert best_of_k(scores, values)[0, -1] == best_of_n(scores, values) == 20


def test_best_of_k_of_many_uniform_scores_is_the_mean_of_a_maximum():
    """Of the scores 1 to n the largest of k is k (n + 1) / (k + 1) in the mean."""
    n = 4096
    scores = torch.randperm(n).double()[None] + 1
    k = torch.arange(1, n + 1, dtype=torch.float64)
    torch.testing.assert_close(best_of_k(scores, scores)[0], k * (n + 1) / (k + 1), rtol=1e-9, atol=0)


def test_the_curve_has_standard_errors_over_prompts():
    scores, values = torch.randn(2, 5, 4, dtype=torch.float64)
    points = curve(scores, {"gold": values})
    assert [point["k"] for point in points] == [1, 2, 3, 4] and points[2]["kl"] == best_of_n_kl(3)
    best = values.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    assert (points[-1]["gold"], points[-1]["gold_error"]) == pytest.approx((Mean.of(best).mean, Mean.of(best).error))
    assert points[0]["gold"] == pytest.approx(values.mean().item())


@pytest.fixture
def settings(tmp_path, monkeypatch):
    return search_settings(tmp_path, monkeypatch)


@pytest.mark.usefixtures("one_thread")
def test_the_best_responses_are_demonstrations_and_a_stopped_run_goes_on(settings, tmp_path, capsys, monkeypatch):
    assert main(["best-of-n", *arguments(settings)]) == 0
    out = tmp_path / "best"
    rows, best = read_jsonl(out / "candidates.jsonl"), read_jsonl(out / "best.jsonl")
    assert len(rows) == 5 and len(best) == 5 and "5 of 5 best responses kept" in capsys.readouterr().out
    for row, chosen in zip(rows, best, strict=True):
        scores = row["scores"]["reward"]
        parts = (row["scores"][name] for name in ("best_rules:early", "best_rules:short"))
        assert scores == pytest.approx([a + 0.001 * b for a, b in zip(*parts, strict=True)], abs=1e-6)
        assert chosen["score"] == max(scores) and chosen["completion"] == row["completions"][np.argmax(scores)]
        assert chosen["prompt"] == row["prompt"] and len(set(row["completions"])) > 1
    summary = json.loads((out / "summary.json").read_text())
    everything = np.array([row["scores"]["gold"] for row in rows])
    within = np.sqrt(everything.var(1, ddof=1).mean())
    expected = {"mean": everything.mean(), "deviation": everything.std(), "deviation_within": within}
    assert summary["moments"]["gold"] == pytest.approx(expected)
    assert summary["best_of_k"][0]["gold"] == pytest.approx(everything.mean())
    assert summary["best_of_k"][3]["reward"] == pytest.approx(np.mean([row["score"] for row in best]), abs=1e-6)
    sft = SFT(
        SFTConfig(model=settings["model"], data=str(out / "best.jsonl"), output=str(tmp_path / "sft"), device="cpu")
    )
    assert next(sft)["loss"] > 0

    whole = (out / "candidates.jsonl").read_bytes()
    (out / "candidates.jsonl").write_bytes(whole[: len(whole) // 2])  # killed while it wrote
    (out / "best.jsonl").unlink()
    assert main(["best-of-n", *arguments(settings)]) == 1
    assert "--resume (resume=True) continues" in capsys.readouterr().err
    assert main(["best-of-n", *arguments(settings), "--resume"]) == 0
    assert (out / "candidates.jsonl").read_bytes() == whole and read_jsonl(out / "best.jsonl") == best
    write_rows(settings["data"], [{"prompt": f"other {n}", "topic": "t"} for n in range(5)])
    assert main(["best-of-n", *arguments(settings), "--resume"]) == 1
    assert "has changed since the run began" in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
def test_a_block_that_was_not_written_whole_is_drawn_anew(settings, tmp_path, monkeypatch):
    """So that every response is drawn, and scored by a model, beside the same others."""
    module = importlib.import_module("fastrlhf.commands.best_of_n")
    monkeypatch.setattr(module, "BLOCK", 8)  # two prompts
    assert main(["best-of-n", *arguments(settings)]) == 0
    path, judged, asked = tmp_path / "best/candidates.jsonl", module.judged_rows, []

    def counting(draw, prompts, *rest):
        asked.append(len(prompts))
        return judged(draw, prompts, *rest)

    monkeypatch.setattr(module, "judged_rows", counting)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut, expected in ((lines[:3], [2, 1]), ([*lines[:4], lines[4][:9]], [1]), (lines, [])):
        path.write_bytes(b"".join(cut))
        assert main(["best-of-n", *arguments(settings), "--resume"]) == 0
        assert path.read_bytes() == whole and asked == expected
        asked.clear()


@pytest.mark.usefixtures("one_thread")
def test_what_is_not_known_of_one_prompt_is_null(settings, tmp_path):
    assert main(["best-of-n", *arguments({**settings, "limit": 1})]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    summary = json.loads((tmp_path / "best/summary.json").read_text(), parse_constant=refuse)
    assert summary["best_of_k"][0]["gold_error"] is None


@pytest.mark.usefixtures("one_thread")
def test_responses_that_were_cut_off_are_no_demonstrations_unless_asked_for(settings, tmp_path, capsys):
    assert main(["best-of-n", *arguments({**settings, "keep_unfinished": "false", "limit": 2})]) == 0
    rows = read_jsonl(tmp_path / "best/candidates.jsonl")
    finished = [row["finished"][np.argmax(row["scores"]["reward"])] for row in rows]
    assert f"{sum(finished)} of 2 best responses kept; left out: {2 - sum(finished)} cut off" in capsys.readouterr().out
    short = {**settings, "keep_unfinished": "false", "limit": 2, "max_new_tokens": 1, "overwrite": "true"}
    assert main(["best-of-n", *arguments(short)]) == 0
    told = capsys.readouterr().out
    assert "0 of 2 best responses kept" in told and "raise max_new_tokens" in told
    assert f"best responses: none, {tmp_path / 'best/best.jsonl'} is empty" in told
    assert main(["best-of-n", *arguments({**short, "keep_unfinished": "true"})]) == 0
    assert f"best responses: {tmp_path / 'best/best.jsonl'}\n" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"reward": "max(a|b)"}, "no max"),
        ({"gold": "best_rules:nothing"}, "has no function 'nothing'"),
        ({"data": "nowhere.jsonl"}, "no file 'nowhere.jsonl'"),
        ({"model": "./nowhere"}, "./nowhere"),
    ],
)
def test_bad_input_is_named_and_leaves_no_folder(settings, tmp_path, capsys, changes, text):
    assert main(["best-of-n", *arguments({**settings, **changes})]) == 1
    assert text in capsys.readouterr().err and not (tmp_path / "best").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n": 1}, "n must be at least 2"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"dtype": "f"}, "dtype"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        BestOfNConfig(**{"model": "m", "data": "d", "output": "o", "reward": "r", **changes})
