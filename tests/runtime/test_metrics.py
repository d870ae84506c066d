import json
import os
import re
import time

import pytest
import torch

from fastrlhf.runtime.jsonl import read_jsonl, truncate_after_step
from fastrlhf.runtime.metrics import (
    MetricsLog,
    Statistics,
    held_out_text,
    peak_memory_gib,
    reset_peak_memory,
    short_number,
)


def test_metrics_hold_what_was_given_and_timing_the_clock(tmp_path):
    log = MetricsLog(tmp_path, num_steps=2)
    with log.timer("generate"):
        pass
    log.add(1, {"loss": 0.5, "grad_norm": float("nan"), "num_tokens": 100})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "grad_norm": None, "num_tokens": 100}]
    (timing,) = read_jsonl(tmp_path / "timing.jsonl")
    phase = {"generate_seconds", "generate_share"}
    assert {"step", "seconds", "tokens_per_second", "peak_memory_gib"} | phase == set(timing)
    assert timing["tokens_per_second"] * timing["seconds"] == pytest.approx(100)


def test_a_phase_has_its_share_of_the_time_and_its_tokens_a_second(tmp_path, capsys):
    log = MetricsLog(tmp_path, num_steps=11)
    log.timer.count(1_000_000)  # outside of a phase: of none
    for step in range(1, 12):
        with log.timer("generate"):
            time.sleep(0.01)
            log.timer.count(30)
            log.timer.count(20)
        with log.timer("score"):
            pass
        log.add(step, {"loss": 0.5, "num_tokens": 100})
    for timing in read_jsonl(tmp_path / "timing.jsonl"):
        assert timing["generate_share"] * timing["seconds"] == pytest.approx(timing["generate_seconds"])
        assert timing["generate_tokens_per_second"] * timing["generate_seconds"] == pytest.approx(50)
        assert timing["generate_share"] > 0.5 and "score_tokens_per_second" not in timing
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  time: ")]
    assert len(lines) == 2  # after ten steps, and after the last
    assert re.fullmatch(r"  time: generate \d+% at \d+ tokens/s, score \d+%", lines[0])


def test_resuming_cuts_back_to_the_step_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "x": 0.1 * step}) + "\n" for step in (1, 2, 3)]
    path.write_text("".join(lines) + '{"step": 4, "x')
    MetricsLog(tmp_path, num_steps=9, step=2)
    assert path.read_text() == "".join(lines[:2])
    truncate_after_step(path, 0)
    assert path.read_text() == ""


def test_the_table_fits_a_pipe(tmp_path, capsys):
    log = MetricsLog(tmp_path, num_steps=1000)
    names = ["objective/scores", "objective/kl", "objective/entropy", "response/length", "response/eos_rate"]
    names += ["ppo/policy/clip_fraction", "ppo/value/explained_variance", "ppo/policy/grad_norm", "learning_rate"]
    for step in range(1, 4):
        metrics = dict.fromkeys(names, -1.234567e-5)
        if step == 3:
            metrics["eval/loss"] = 2.5
        log.add(step, {**metrics, "num_tokens": 10})
    header, *rows, held_out = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["step", "score", "kl", "entropy"]
    assert len(rows) == 3
    assert {len(line) for line in (header, *rows)} == {len(header)}
    assert len(header) <= 110
    assert held_out == "  held out: loss 2.5"


def test_the_held_out_line_says_what_ends_and_counts_are_of_and_keeps_heads_apart():
    of_all = {"loss": 0.75, "accuracy": 0.25, "accuracy_low": 0.05, "accuracy_high": 0.7, "ties": 0, "num_pairs": 4}
    assert held_out_text(of_all) == "loss 0.75, accuracy 0.25 (95 % interval 0.05 to 0.7), 0 ties, 4 pairs"
    metrics = {"loss": 2.5, "kind/correlation": 0.5, "kind/correlation_low": -0.5, "kind/correlation_high": 0.75}
    text = held_out_text({**metrics, "kind/num_ratings": 1234567, "rmse": 1.5})
    assert text == "loss 2.5, rmse 1.5; kind: correlation 0.5 (95 % interval -0.5 to 0.75), 1234567 ratings"


def test_a_metric_that_comes_later_gets_its_column(tmp_path, capsys):
    """PPO trains the value model alone first, so the policy's metrics begin at a later step."""
    log = MetricsLog(tmp_path, num_steps=9)
    for step, more in enumerate([{}, {}, {"ppo/policy/clip_fraction": 0.5}, {"ppo/policy/clip_fraction": 0.25}], 1):
        log.add(step, {"objective/kl": 1.0, **more, "num_tokens": 10})
    rows = [" ".join(line.split()[:-1]) for line in capsys.readouterr().out.splitlines()]
    assert rows == ["step kl", "1/9 1", "2/9 1", "step kl clipped", "3/9 1 0.5", "4/9 1 0.25"]


def test_statistics_are_sums_but_for_those_that_are_said_to_be_extremes():
    """Micro-batches add up, minibatches are averaged, whatever their names are (tokens_max is a sum)."""
    shares = torch.tensor([[1.0, -4.0], [0.5, 3.0]])  # a minibatch a row, of two micro-batches
    minibatches = []
    for row in shares:
        stats = Statistics()
        for value in row:
            values = dict.fromkeys(("loss", "tokens_max", "largest", "smallest"), value)
            stats.add("ppo/", values, extremes={"largest": "max", "smallest": "min"})
        minibatches.append(stats)
    found = {name: value.item() for name, value in Statistics.mean(minibatches).items()}
    mean = shares.sum(1).mean().item()
    extremes = {"ppo/largest": shares.max().item(), "ppo/smallest": shares.min().item()}
    assert found == {"ppo/loss": mean, "ppo/tokens_max": mean, **extremes}
    assert Statistics.mean([Statistics(), minibatches[0]])["ppo/smallest"] == -4.0  # no policy update in the first


@pytest.mark.parametrize("value", [0.0, 1, -1.23456789e-12, 123456789.0, -0.333333, float("nan"), float("inf")])
def test_a_number_of_the_table_fits_its_column(value):
    assert len(short_number(value)) <= 9


def test_the_bar_is_silent_in_a_pipe(tmp_path, capsys):
    with MetricsLog(tmp_path, num_steps=1).progress("generating", total=10) as advance:
        advance(10)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_tensorboard_files_hold_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, num_steps=1, tensorboard=True)
    log.add(1, {"loss": 0.5, "num_tokens": 3})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5)]


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastrlhf\[tensorboard\]'"):
        MetricsLog(tmp_path, num_steps=1, tensorboard=True)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system keeps the peak of a process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the peak is that of the GPU")
def test_what_was_taken_earlier_in_the_process_is_not_in_the_peak_of_a_run():
    b"x" * (1 << 30)
    before = reset_peak_memory()
    assert peak_memory_gib() - before < 0.1
    b"x" * (1 << 29)
    assert 0.4 < peak_memory_gib() - before < 0.6
