"""How much of one reward costs how much of another: `fastrlhf sweep`, over weights of the two.

<output>/candidates.jsonl   n responses to each prompt, judged by both
<output>/ppo/WEIGHT         with --ppo: what PPO writes for each weight; WEIGHT.json: its answers, judged
<output>/sweep.json, sweep.csv, sweep.svg   a point a weight and method: the mean of each reward, with standard errors
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastrlhf.commands.best_of_n import candidates, moments, prompts_of, scores_of
from fastrlhf.data.template import load_tokenizer
from fastrlhf.errors import UserError
from fastrlhf.evaluation import plots
from fastrlhf.evaluation.answers import answer, best_of_n, best_of_n_kl, kl_of_responses
from fastrlhf.evaluation.tables import as_csv
from fastrlhf.generation.engine import Sampling
from fastrlhf.rewards.combine import parse_reward
from fastrlhf.rewards.scorer import Scorer
from fastrlhf.runtime.atomic_io import write_file, write_json
from fastrlhf.runtime.output_folder import OutputFolder
from fastrlhf.runtime.resume_check import check_stage_unchanged
from fastrlhf.settings.best_of_n import SHARED, SweepConfig
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.settings.yaml_file import read_further
from fastrlhf.stats.means import Mean, with_error
from fastrlhf.trainers.ppo.trainer import PPO

Row = dict[str, Any]
NAMES = ("first", "second")
TAKEN = ("model", "reward", "output", "resume", "overwrite", "temperature")  # settings of PPO that no file may change
OURS = ("config.yaml", "inputs.json", "candidates.jsonl", "ppo", "sweep.json", "sweep.csv", "sweep.svg")
COLUMNS = ("method", "weight", "kl", "first", "first_error", "second", "second_error")
JUDGED = 1 << 24  # first seed of PPO's answers; best-of-n's start at 0


def sweep(config: SweepConfig) -> Iterator[str]:
    """Does it all; yields the table. Raises: what loading raises, before any response is drawn."""
    output = Path(config.output)
    for name in NAMES:
        value = parse_reward(getattr(config, name))
        if len(value.parts) != 1 or value.numbers != (1.0,):
            raise UserError(f"{name}: give one reward without a weight, got {getattr(config, name)!r}")
    further, folder = read_further(PPOConfig, config.ppo, taken=TAKEN), OutputFolder(config, OURS)
    for weight in config.shares() if config.ppo else ():
        # refused now, and not after the responses are drawn
        ppo_config(config, weight, f"{config.first},{config.second}", further)
    rows = candidates(config, {name: getattr(config, name) for name in NAMES}, folder, least=2)
    units = moments(rows)
    texts = [standard(getattr(config, name), units[name]) for name in NAMES]
    first, second = (scores_of(rows, name) for name in NAMES)
    points = [best_point(weight, first, second, units) for weight in config.shares()]
    if config.ppo:
        for weight in config.shares():
            reward = ",".join(f"{text}={w:g}" for text, w in zip(texts, (weight, 1 - weight), strict=True))
            points.append(trained_point(config, weight, reward, further))
    points.insert(0, {"method": "start", "weight": None, "kl": 0.0, **judged(first.mean(1), second.mean(1))})
    summary = {"n": config.n, "rewards": dict(zip(NAMES, texts, strict=True)), "points": points}
    write_json(output / "sweep.json", summary)
    write_file(output / "sweep.csv", as_csv(points, COLUMNS).encode())
    if plots.available():
        write_file(output / "sweep.svg", svg(points))
    yield table(points)
    folder.close()
    yield f"the rewards in deviations within a prompt, for fastrlhf ppo --reward: {texts[0]}=WEIGHT,{texts[1]}=WEIGHT"


def standard(reward: str, unit: dict[str, float]) -> str:
    """The reward in deviations within a prompt, among which best-of-n chooses, in the grammar of combine.py.

    Raises: ValueError where all its scores of a prompt are the same."""
    if unit["deviation_within"] <= 0:
        raise UserError(f"sweep: all responses to a prompt have the same score by {reward}")
    return f"standard({reward};{unit['mean']:.6g};{unit['deviation_within']:.6g})"


def best_point(weight: float, first: Tensor, second: Tensor, units: dict[str, dict[str, float]]) -> Row:
    """Both rewards of the response with the best weighted sum, in the mean over prompts. first, second: (P, n)"""
    a, b = (
        (values - units[name]["mean"]) / units[name]["deviation_within"]
        for name, values in zip(NAMES, (first, second), strict=True)
    )
    total = weight * a + (1 - weight) * b
    chosen = judged(best_of_n(total, first), best_of_n(total, second))
    return {"method": "best_of_n", "weight": weight, "kl": best_of_n_kl(first.shape[1]), **chosen}


def judged(first: Tensor, second: Tensor) -> Row:
    """Means and standard errors of both rewards (P,)."""
    return Mean.of(first).named("first") | Mean.of(second).named("second")


def ppo_config(config: SweepConfig, weight: float, reward: str, further: dict[str, Any]) -> PPOConfig:
    """The settings of PPO for a weight; those of the YAML file win."""
    folder = Path(config.output) / "ppo" / f"{weight:g}"
    names = (*SHARED, "max_prompt_tokens", "max_new_tokens", "temperature")
    options = {name: getattr(config, name) for name in names} | config.reward_options()
    return PPOConfig(**{**options, **further, "reward": reward, "output": str(folder), "resume": folder.exists()})


def trained_point(config: SweepConfig, weight: float, reward: str, further: dict[str, Any]) -> Row:
    """Both rewards of what PPO makes of the policy, in the mean over an answer to each prompt; its KL."""
    path, settings = Path(config.output) / "ppo" / f"{weight:g}.json", ppo_config(config, weight, reward, further)
    check_stage_unchanged(settings)
    if path.exists():
        row: Row = json.loads(path.read_text())
        return row
    trainer, tokenizer = PPO(settings), load_tokenizer(config.model)
    trainer.run()
    prompts = prompts_of(config, tokenizer)
    options: dict[str, Any] = {"device": trainer.device, "autocast": trainer.config.autocast_dtype()}
    options |= {"max_tokens": config.max_tokens, **config.reward_options()}
    judges = {name: Scorer(getattr(config, name), tokenizer, **options) for name in NAMES}
    first = (config.seed << 32) + JUDGED
    answers = answer(
        trainer.models.final,
        tokenizer,
        prompts,
        judges,
        sampling=Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature),
        seeds=range(first, first + len(prompts)),
        max_slots=config.max_slots,
    )
    reference = trainer.reference
    kl = kl_of_responses(
        trainer.models.final, reference, answers, temperature=config.temperature, max_tokens=config.max_tokens
    )
    means = judged(*(answers.judgements[name] for name in NAMES))
    row = {"method": "ppo", "weight": weight, "kl": kl.double().mean().item(), **means}
    write_json(path, row)
    return row


def table(points: Sequence[Row]) -> str:
    """The points as text."""
    lines = [f"{'method':>10}  {'weight':>6}  {'KL':>6}  {'first':>18}  {'second':>18}"]
    for point in points:
        weight = "" if point["weight"] is None else f"{point['weight']:g}"
        cells = [with_error(point[name], point[f"{name}_error"], ">10.4f") for name in NAMES]
        lines.append(
            f"{point['method']:>10}  {weight:>6}  {point['kl']:>6.2f}  " + "  ".join(f"{c:>18}" for c in cells)
        )
    return "\n".join(lines)


def svg(points: Sequence[Row]) -> bytes:
    """The second reward over the first, a point a weight."""
    figure, axis = plots.axes("What one reward costs in the other", "first", "second")
    for method, color in (("start", plots.GREY), ("best_of_n", plots.BEFORE), ("ppo", plots.AFTER)):
        own = [point for point in points if point["method"] == method]
        x, y, dx, dy = ([p[name] for p in own] for name in ("first", "second", "first_error", "second_error"))
        if own:
            axis.errorbar(x, y, dy, dx, color=color, marker="o", markersize=3, linewidth=1, label=method)
        for point in own:
            if point["weight"] is not None:
                where = (point["first"], point["second"])
                axis.annotate(f"{point['weight']:g}", where, xytext=(3, 3), textcoords="offset points", fontsize=7)
    axis.legend(frameon=False, fontsize=8)
    return plots.svg(figure)
