"""Benchmarks check before they time, and the printed figures are the measured ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import filled

from benchmarks import competitors, tables
from benchmarks.__main__ import FILES
from benchmarks.case import Case, Prepared, peak_mib
from benchmarks.harness import Report
from fastrlhf.ops._registry import OPS

ROOT = Path(__file__).parents[2]
# ops that the benchmark of another one times
WITHIN = {"masked_moments": "masked_whiten", "ppo_sequence_loss": "ppo_policy_loss"}


def square(x):
    return (x**2).sum(), x.amax().detach()


def wrong_gradient(x):
    return (x * x.detach()).sum(), x.amax().detach()


def numbers():
    return (torch.linspace(-1, 2, 7),)


def test_every_op_has_a_benchmark():
    assert {WITHIN.get(name, name) for name in OPS} <= FILES.keys()


def test_a_peer_that_is_wrong_is_left_out_and_ours_raises(capsys):
    case = Case(
        "a case", {"fastrlhf": square, "peer": wrong_gradient, "short": lambda x: square(x)[0]}, numbers, square, (0,)
    )
    errors = case.errors(case.make("cpu"))
    assert errors.keys() == {"fastrlhf", "short"} and max(errors.values()) < 1e-6
    assert "peer is left out: AssertionError" in capsys.readouterr().out
    case = Case("a case", {"fastrlhf": wrong_gradient}, numbers, square, (0,))
    with pytest.raises(AssertionError, match="fastrlhf is wrong"):
        case.errors(case.make("cpu"))


def test_what_is_timed_is_the_gradient_of_arguments_made_anew():
    seen = []

    def prepare(x):
        seen.append(x * 1)
        return (seen[-1],)

    case = Case("a case", {"fastrlhf": Prepared(prepare, square)}, numbers, square, (0,))
    timed = case.timed("fastrlhf", case.make("cpu"))
    grads = [timed.run(*timed.prepare()) for _ in range(2)]
    assert seen[-1] is not seen[-2]
    assert [g.tolist() for (g,) in grads] == [(2 * numbers()[0]).tolist()] * 2


def test_the_peak_counts_what_lives_at_a_time_and_the_extra_is_beside_outputs():
    function = Prepared(lambda: (torch.ones(2**18),), lambda x: ((x + 1) * 2) @ torch.ones(2**18, 4))
    assert peak_mib(function) == pytest.approx(1 + 4, abs=0.01)  # at the product x + 1 is gone, 2 (x + 1) is not
    function = Prepared(tuple, lambda: torch.ones(2**18) * 2)
    assert peak_mib(function) == pytest.approx(2, abs=0.01)
    assert peak_mib(function, beside_outputs=True) == pytest.approx(1, abs=0.01)


def test_on_a_gpu_the_peak_is_what_torch_counted_there(monkeypatch):
    counts = {"memory_allocated": 100 * 2**20, "max_memory_allocated": 103 * 2**20, "reset_peak_memory_stats": None}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name, count in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda count=count: count)
    function = Prepared(tuple, lambda: torch.ones(2**18))
    assert peak_mib(function) == 3 and peak_mib(function, beside_outputs=True) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_before_anything_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cuda"])
    with pytest.raises(SystemExit):
        Report("gae", {"cuda": [(1, 1)]})
    assert "torch sees no GPU" in capsys.readouterr().err


def test_peers_that_need_a_gpu_are_left_out_without_one(capsys):
    competitors.find.cache_clear()
    assert competitors.find("liger_kernel.transformers.functional", "cpu") is None
    assert competitors.find("cut_cross_entropy", "cpu") is None
    assert "runs on a GPU only" in capsys.readouterr().err


def test_pytest_times_the_declared_cases():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-k", "discounted_returns"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**alone, "BENCHMARK_SIZES": "tiny", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "discounted_returns: 3 x 5: loop over time" in done.stdout and "2 passed" in done.stdout


def test_the_tables_of_both_pages_are_what_the_csv_files_say():
    for path, text in filled(tables.texts()):
        assert path.read_text() == text, f"{path.name} is stale: python -m benchmarks.tables"


def test_a_headline_is_one_of_the_declared_cases_and_says_when_it_was_not_measured():
    names = {line.benchmark for line in tables.HEADLINES}
    assert names <= FILES.keys()
    assert "not measured" in tables.speed({}) and all(ratio is None for _, ratio in tables.headlines({}))


def test_the_front_page_shows_six_of_the_headlines_and_one_where_we_are_slower():
    lines, measured = tables.front({}).splitlines(), tables.read()
    assert len(lines) == 2 + 6 and all(line.endswith("| not measured |") for line in lines[2:])
    ratios = {(line.what, line.beside): ratio for line, ratio in tables.headlines(measured)}
    assert min(ratios[line] for line in tables.FRONT) < 1
    assert tables.speed(measured).count("\n") == 1 + len(tables.HEADLINES)


def test_what_is_slower_is_said_with_its_ratio():
    rows = [{"benchmark": "gae", "case": "a", "name": n, "ratio": r} for n, r in (("fastrlhf", "1"), ("torch", "0.84"))]
    assert tables.slower({"gae": rows}).endswith("ours: `gae`, a: torch takes 0.84x.")
    assert "Of 1 comparisons" in tables.slower({"gae": rows})
    assert tables.slower({"gae": rows[:1]}).endswith("ours: none.")


def test_generation_is_told_with_its_share_of_the_machines_limits():
    shared = {"case": tables.GENERATION, "memory_limit_ms": "100", "product_limit_ms": "200"}
    rows = [
        {**shared, "name": "fastrlhf", "median": "500", "tokens_per_s": "900.4"},
        {**shared, "name": "generate, dynamic cache", "median": "1500", "tokens_per_s": "300"},
    ]
    text = tables.generation({"generation": rows})
    assert "900 useful tokens a second (`generate`: 300), in 500 ms" in text and "together 60% of the time." in text
    assert tables.generation({}) == "Generation was not measured."


def test_a_page_without_marks_is_not_overwritten():
    with pytest.raises(SystemExit, match="marks of 'speed'"):
        tables.between("text", "speed", "table")
