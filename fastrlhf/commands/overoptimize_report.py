"""What an over-optimisation study shows: the points in standard units, the fitted forms, a plot and a page."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from fastrlhf.evaluation import plots
from fastrlhf.evaluation.html import pairs_line, render, reward_model_line
from fastrlhf.evaluation.tables import as_csv
from fastrlhf.runtime.atomic_io import write_file, write_json
from fastrlhf.runtime.jsonl import read_json, read_jsonl
from fastrlhf.stats.falls import fall_after_best
from fastrlhf.stats.gao_forms import Fit, fit
from fastrlhf.stats.means import describe_z_score, with_error

Row = dict[str, Any]
METHODS = {"best_of_n": "best-of-n", "ppo": "PPO"}
COLUMNS = ("method", "effort", "kl", "distance", "proxy", "proxy_error", "gold", "gold_error")
FORMS = {"best_of_n": "d (a - b d)", "ppo": "d (a - b log d)"}


def describe(stage: str, output: Path) -> str:
    """Returns a line on what a finished stage left in the output folder."""
    if stage == "pairs":
        return pairs_line(output)
    if stage == "proxy":
        return reward_model_line(read_jsonl(output / "proxy/metrics.jsonl")[-1])
    if stage == "report":
        return verdict(read_json(output / "summary.json"))
    last = read_json(output / f"{stage}.json")["points"][-1]
    return f"proxy {last['proxy']:.3f}, gold {last['gold']:.3f} at a KL of {last['kl']:.2f} nats"


def efforts(num: int) -> list[int]:
    """The n of best-of-n that are shown: 1, 2, 3, 4, 6, 8, 11, ..., a factor of sqrt(2) apart, and the last."""
    return sorted({n for step in range(2 * num.bit_length()) if (n := round(2 ** (step / 2))) <= num} | {num})


def points_of(output: Path) -> list[Row]:
    """The points of both methods, gold and proxy in standard units of the policy's responses at the start, the gold of
    each prompt (gold_of_prompts) among them. Of best-of-n those of `efforts`."""
    found = read_json(output / "best_of_n.json")
    moments = found["moments"]
    wanted = efforts(len(found["points"]))
    drawn = [{**point, "effort": point["k"]} for point in found["points"] if point["k"] in wanted]
    trained = [{**point, "effort": point["step"]} for point in read_json(output / "ppo.json")["points"]]
    rows = []
    for method, points in (("best_of_n", drawn), ("ppo", trained)):
        for point in points:
            row = {"method": method, "effort": point["effort"], "kl": point["kl"]}
            row["distance"] = math.sqrt(max(point["kl"], 0.0))
            for name in ("proxy", "gold"):
                unit = moments[name]["deviation"] or 1.0
                row[name] = (point[name] - moments[name]["mean"]) / unit
                error = point[f"{name}_error"]
                row[f"{name}_error"] = math.nan if error is None else error / unit
            row["gold_of_prompts"] = [value / unit for value in point.get("gold_of_prompts", [])]
            rows.append(row)
    return rows


def summarise(rows: list[Row]) -> dict[str, Any]:
    """By method: the fit, the best gold point, the last one, and the fall of gold after the best of num_points.

    fall: as half of the prompts choose the best point and the other half measures from it (`fall_after_best`), in
    which the best is not ahead by chance; fall_error, fall_in_errors: of differences on the same prompts. None where an
    older version wrote the points without the prompts."""
    summary: dict[str, Any] = {}
    for method in METHODS:
        points = [row for row in rows if row["method"] == method]
        best, last = (shown(row) for row in (max(points, key=lambda row: row["gold"]), points[-1]))
        prompts = [torch.tensor(row["gold_of_prompts"], dtype=torch.float64) for row in points]
        fall = fall_after_best(prompts) if all(map(len, prompts)) else None
        kl, gold = (torch.tensor([row[name] for row in points], dtype=torch.float64) for name in ("kl", "gold"))
        fitted: Fit | None = fit(kl, gold, method) if int((kl > 0).sum()) > 2 else None
        summary[method] = {
            "best": best,
            "last": last,
            "num_points": len(points),
            "fall": fall and fall.mean,
            "fall_error": fall and fall.error,
            "fall_in_errors": fall and fall.z_score,
            "proxy_rise_after_best": last["proxy"] - best["proxy"],
            "fit": fitted and {**asdict(fitted), "peak": fitted.peak},
        }
    return summary


def shown(row: Row) -> Row:
    """A point without the values of each prompt."""
    return {name: row[name] for name in COLUMNS}


def verdict(summary: dict[str, Any]) -> str:
    """One sentence a method."""
    texts = []
    for method, name in METHODS.items():
        found = summary[method]
        best, last = found["best"], found["last"]
        texts.append(
            f"{name}: of {found['num_points']} points gold is best, {best['gold']:+.2f}, at sqrt(KL) = "
            f"{best['distance']:.2f}; at the last, {last['distance']:.2f}, it is {last['gold']:+.2f} and the proxy "
            f"{last['proxy']:+.2f} after {best['proxy']:+.2f}; measured on prompts that did not choose the best: "
            f"{fall_line(found)}"
        )
    return "; ".join(texts)


def fall_line(found: dict[str, Any]) -> str:
    """The fall in words, and how sure it is."""
    if found["fall"] is None:
        return "a fall of unknown size, since an older version wrote the points"
    value, error = found["fall"], found["fall_error"]
    return f"a fall of {with_error(value, error, '.2f')} ({describe_z_score(value, error)}) from the best"


def write_report(output: Path) -> None:
    """Writes points.csv, summary.json, report.html and, where matplotlib is installed, curves.svg."""
    rows = points_of(output)
    summary = summarise(rows)
    write_file(output / "points.csv", as_csv(rows, COLUMNS).encode())
    write_json(output / "summary.json", summary)
    picture = None
    if plots.available():
        image = svg(rows, summary)
        write_file(output / "curves.svg", image)
        picture = Markup(image[image.index(b"<svg") :].decode())
    page = render(
        "commands/overoptimize_report.html.j2",
        verdict=verdict(summary),
        proxy=describe("proxy", output),
        pairs=describe("pairs", output),
        picture=picture,
        fits=fits_table(summary),
        columns=COLUMNS,
        points=[[cell(row[name]) for name in COLUMNS] for row in rows],
        settings=(output / "config.yaml").read_text(encoding="utf-8"),
    )
    write_file(output / "report.html", page.encode())


def fits_table(summary: dict[str, Any]) -> list[list[str]]:
    """A row of the page for each form that was fitted."""
    rows = []
    for method, name in METHODS.items():
        if found := summary[method]["fit"]:
            errors = {key: f"{found[key]:.3f} ± {found[f'{key}_error']:.3f}" for key in ("alpha", "beta")}
            peak = "none" if found["peak"] is None else "{:.2f} nats, {:.2f}".format(*found["peak"])
            r_squared = "none: gold does not vary" if math.isnan(found["r_squared"]) else f"{found['r_squared']:.3f}"
            rows.append([name, FORMS[method], errors["alpha"], errors["beta"], r_squared, peak])
    return rows


def cell(value: Any) -> str:
    """A value of the table of points."""
    return f"{value:.3f}" if isinstance(value, float) else METHODS.get(value, str(value))


def svg(rows: list[Row], summary: dict[str, Any]) -> bytes:
    """Gold with its fit, and proxy, over sqrt(KL), a panel a method."""
    titles = list(METHODS.values())
    figure, panels = plots.panels(titles, "sqrt(KL)", "standard deviations at the start", size=(9, 3.4))
    for axis, method in zip(panels, METHODS, strict=True):
        points = [row for row in rows if row["method"] == method]
        x = [row["distance"] for row in points]
        for what, color, style in (("proxy", plots.BEFORE, "--"), ("gold", plots.AFTER, "none")):
            y, error = ([row[key] for row in points] for key in (what, f"{what}_error"))
            axis.errorbar(x, y, error, color=color, linestyle=style, marker="o", markersize=3, label=what)
        found = summary[method]["fit"]
        if found:
            form = Fit(**{key: value for key, value in found.items() if key != "peak"})
            grid = [max(x) * (n + 1) / 100 for n in range(100)]
            axis.plot(grid, [form(d * d) for d in grid], color=plots.AFTER, linewidth=1, label=FORMS[method])
        axis.legend(frameon=False, fontsize=8)
    return plots.svg(figure)
