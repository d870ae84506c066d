"""What came out of the main job: a line a stage, and one HTML file with everything in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastrlhf.evaluation import plots
from fastrlhf.evaluation.html import mean, pairs_line, render, reward_model_line
from fastrlhf.runtime.atomic_io import write_file
from fastrlhf.runtime.jsonl import read_json, read_jsonl
from fastrlhf.stats.means import describe_z_score, with_error

STAGES = ("data", "sft", "pairs", "reward", "ppo", "evaluation")
NUM_SAMPLES = 24


def describe(stage: str, output: Path) -> str:
    """Returns a line on what a finished stage left in the output folder."""
    if stage == "data":
        return ", ".join(f"{len(read_jsonl(path))} {path.stem}" for path in sorted((output / "data").iterdir()))
    if stage == "pairs":
        return pairs_line(output)
    if stage == "evaluation":
        return verdict(read_json(output / "evaluation/summary.json"))
    if stage == "report":
        return str(output / "report.html")
    last = read_jsonl(output / stage / "metrics.jsonl")[-1]
    if stage == "reward":
        return reward_model_line(last)
    if stage == "ppo":
        return f"score {last['objective/scores']:.2f}, KL {last['objective/kl']:.2f} nats a response in the last step"
    return f"loss {last['loss']:.3f} in the last step"


def verdict(summary: dict[str, Any]) -> str:
    """The one sentence of the evaluation."""
    gold, difference = summary["gold"], summary["gold"]["difference"]
    errors = describe_z_score(difference["mean"], difference["error"])
    rise = with_error(difference["mean"], difference["error"], "+.3f")
    return (
        f"gold reward {gold['before']['mean']:.3f} before PPO, {gold['after']['mean']:.3f} after: "
        f"{rise} ({errors}) on {difference['num']} held-out prompts, at a KL of {mean(summary['kl'])} nats"
    )


def results(summary: dict[str, Any]) -> list[list[str]]:
    """The rows of the table of results: what, before, after, difference."""
    rows = [
        [what, *(mean(summary[name][when]) for when in ("before", "after", "difference"))]
        for name, what in (("gold", "gold reward"), ("reward", "reward model score"))
    ]
    for name, what in (
        ("eos_rate", "responses that end by themselves"),
        ("length", "tokens a response"),
        ("distinct", "share of different responses"),
    ):
        before, after = summary[f"{name}_before"], summary[f"{name}_after"]
        rows.append([what, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"])
    return [*rows, ["KL to the SFT policy, nats a response", "0", mean(summary["kl"]), ""]]


def write_report(output: Path) -> Path:
    """Writes `<output>/report.html`, a page that needs no other file; returns its path. Plots need matplotlib."""
    summary = read_json(output / "evaluation/summary.json")
    answers = read_jsonl(output / "evaluation/answers.jsonl")
    metrics: dict[str, plots.Rows] = {
        name: read_jsonl(output / name / "metrics.jsonl") for name in ("sft", "reward", "ppo")
    }
    seconds: dict[str, float] = {}
    for row in read_jsonl(output / "timing.jsonl"):
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["seconds"]
    page = render(
        "commands/run_report.html.j2",
        verdict=verdict(summary),
        summary=summary,
        results=results(summary),
        stages=[[name, describe(name, output), f"{seconds.get(name, 0):.0f}"] for name in STAGES],
        figures=figures(metrics, answers, summary) if plots.available() else [],
        answers=answers[:NUM_SAMPLES],
        settings=(output / "config.yaml").read_text(encoding="utf-8"),
    )
    write_file(output / "report.html", page.encode())
    return output / "report.html"


def figures(metrics: dict[str, plots.Rows], answers: plots.Rows, summary: dict[str, Any]) -> list[Markup]:
    """The plots."""
    ppo = metrics["ppo"]
    return [
        plots.curve(ppo, "objective/scores", "PPO: reward model score", "mean score"),
        plots.curve(ppo, "objective/kl", "PPO: KL to the SFT policy", "nats a response"),
        plots.reward_over_kl(ppo),
        plots.gold_distribution(answers),
        plots.gold_over_score(answers),
        plots.calibration_plot(summary["calibration"]),
        plots.curve(ppo, "response/length", "PPO: response length", "tokens", low=0),
        plots.curve(ppo, "response/eos_rate", "PPO: responses that end by themselves", "share", low=0, high=1.05),
        plots.curve(
            metrics["reward"], "accuracy", "Reward model: accuracy in training", "share of pairs", low=0, high=1.05
        ),
        plots.curve(metrics["sft"], "loss", "SFT: loss", "nats a token", low=0),
    ]
