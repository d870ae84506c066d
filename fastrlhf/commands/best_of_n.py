"""Several responses to each prompt, and the best of them: `fastrlhf best-of-n`, and what the sweep chooses from.

<output>/candidates.jsonl   a row a prompt: its n responses and the n scores of each judge and each source
<output>/best.jsonl         the best response to each prompt: prompt, completion, score (a file for fastrlhf sft)
<output>/summary.json       best-of-k for all k up to n, over the KL; mean and deviation of the scores

A run that was stopped goes on after the last whole block of candidates.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrlhf.data import Prompt, load_prompts
from fastrlhf.data.template import load_tokenizer
from fastrlhf.errors import DataError, UserError
from fastrlhf.evaluation.answers import Answers, answer, best_of_n_kl
from fastrlhf.generation.engine import Sampling
from fastrlhf.models.policy import Policy
from fastrlhf.models.shared_prompts import can_share_prompts
from fastrlhf.rewards.scorer import Scorer
from fastrlhf.rewards.sources import check_reward
from fastrlhf.runtime import distributed
from fastrlhf.runtime.atomic_io import append_text, write_file, write_json
from fastrlhf.runtime.jsonl import as_json, read_jsonl, whole_lines, with_checksum, write_jsonl
from fastrlhf.runtime.metrics import MetricsLog
from fastrlhf.runtime.output_folder import OutputFolder
from fastrlhf.settings.best_of_n import BestOfNConfig, CandidatesConfig
from fastrlhf.stats.means import Mean, with_error

Row = dict[str, Any]
BLOCK = 1024  # responses between two writes of candidates.jsonl
OURS = ("config.yaml", "inputs.json", "candidates.jsonl", "best.jsonl", "summary.json")


def best_of_k(scores: Tensor, values: Tensor) -> Tensor:
    """Returns what best-of-k gives in the mean over all choices of k of the n responses, (P, n) for k = 1 to n.

    With s_1 <= ... <= s_n the scores of a prompt and v_i the values in that order: sum_i C(i - 1, k - 1) / C(n, k) v_i.
    Unbiased for each k, and less noisy than one choice of k.

    scores: (P, n), by which the best is chosen, of equal ones the first; values: (P, n), of which it is told

    Source: Nakano et al., arXiv 2112.09332, appendix I."""
    n = scores.shape[1]
    ordered = values.double().gather(1, n - 1 - scores.flip(1).argsort(dim=1, stable=True))
    place = torch.arange(1, n + 1, dtype=torch.float64)
    k = place[:, None]
    log_weight = _log_choose(place - 1, k - 1) - _log_choose(torch.tensor(float(n), dtype=torch.float64), k)
    return ordered @ torch.where(place >= k, log_weight.exp(), 0.0).T


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """log C(n, k), of which those with k > n mean nothing."""
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1)


def curve(scores: Tensor, judged: dict[str, Tensor]) -> list[Row]:
    """Returns a row for each k = 1 to n: k, kl (a bound, nats), and NAME, NAME_error of what best-of-k gives by each
    judge, with standard errors over prompts. scores, and each of judged: (P, n)"""
    means = {name: best_of_k(scores, values) for name, values in judged.items()}
    rows = []
    for k in range(1, scores.shape[1] + 1):
        rows.append({"k": k, "kl": best_of_n_kl(k)})
        for name, values in means.items():
            rows[-1] |= Mean.of(values[:, k - 1]).named(name)
    return rows


def candidates(config: CandidatesConfig, judges: dict[str, str], folder: OutputFolder, *, least: int = 1) -> list[Row]:
    """Draws and judges n responses to each prompt; returns the rows of candidates.jsonl, which it writes.

    A response depends on the seed, its prompt's number and its own. A block of responses that was not written whole is
    drawn anew, so that scores, too, are those of a run that was not stopped, to the last bit.

    judges: rewards by name; folder: the command's own, not open yet; least: prompts that are needed
    A row: prompt; completions, finished: of n responses; scores: of n responses by judge, and by source

    Raises: what loading raises, before any response is drawn."""
    check_reward(*judges.values())
    path, tokenizer = Path(config.output) / "candidates.jsonl", load_tokenizer(config.model)
    device, autocast = config.resolve_device(), config.autocast_dtype()
    prompts = prompts_of(config, tokenizer, least=least)
    columns = {name for prompt in prompts for name in prompt.columns}
    options: dict[str, Any] = {"max_tokens": config.max_tokens, "device": device, "autocast": autocast}
    options |= config.reward_options()
    scorers = {name: Scorer(reward, tokenizer, columns=columns, **options) for name, reward in judges.items()}
    share_prompts = all(can_share_prompts(model, device) for s in scorers.values() for model, _ in s.models)
    policy = Policy.from_pretrained(config.model, device=device, autocast=autocast, freeze=True)
    folder.open()
    size = max(1, BLOCK // config.n)
    rows = whole_rows(path, size, len(prompts))
    if [row["prompt"] for row in rows] != [prompt.turns for prompt in prompts[: len(rows)]]:
        raise UserError(f"resume: the prompts of {config.data} are no longer those of {path}")
    sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    left = (len(prompts) - len(rows)) * config.n * config.max_new_tokens
    with MetricsLog.progress("generate", left) as advance:
        draw = partial(
            answer,
            policy,
            tokenizer,
            sampling=sampling,
            max_slots=config.max_slots,
            share_prompts=share_prompts,
            progress=advance,
        )
        while len(rows) < len(prompts):
            first = (config.seed << 32) + len(rows) * config.n
            new = judged_rows(draw, prompts[len(rows) : len(rows) + size], config.n, first, scorers)
            folder.check()
            append_text(path, "".join(with_checksum(as_json(row)) + "\n" for row in new))
            rows += new
    return rows


def judged_rows(
    draw: Callable[..., Answers], prompts: Sequence[Prompt], n: int, first: int, scorers: dict[str, Scorer]
) -> list[Row]:
    """Returns a row for each prompt, with n responses. draw: `answer`, given its policy; first: seed"""
    asked = [prompt for prompt in prompts for _ in range(n)]
    judges = {name: _Terms(scorer) for name, scorer in scorers.items()}
    answers = draw(asked, judges, seeds=range(first, first + len(asked)))
    scores = {name: values for terms in judges.values() for name, values in terms.seen.items()}
    scores |= answers.judgements
    rows = []
    for number, prompt in enumerate(prompts):
        own = slice(number * n, (number + 1) * n)
        row: Row = {"prompt": prompt.turns, "completions": answers.texts[own]}
        row["finished"] = [sample.finished for sample in answers.samples[own]]
        row["scores"] = {name: values[own].tolist() for name, values in scores.items()}
        rows.append(row)
    return rows


class _Terms:
    """A scorer that keeps what each of its sources said."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.seen = scorer, dict[str, Tensor]()

    def __call__(self, prompts: Sequence[Prompt], samples: Any, batch: Any) -> Tensor:
        terms = self.scorer.terms(prompts, samples, batch)
        if len(terms) > 1:
            self.seen = dict(zip(self.scorer.sources, terms, strict=True))
        return self.scorer.total(terms)


def prompts_of(config: CandidatesConfig, tokenizer: Any, *, least: int = 1) -> list[Prompt]:
    """The prompts of the data. Raises: DataError for fewer than `least`."""
    names = ("max_prompt_tokens", "limit", "template", "template_kwargs", "max_rejected")
    options = {name: getattr(config, name) for name in names}
    loaded = load_prompts(config.data, tokenizer, **options)
    distributed.print_once(loaded.report)
    if len(loaded.rows) < least:
        raise DataError(f"data: {config.data} has {len(loaded.rows)} prompt; standard errors take at least {least}")
    return loaded.rows


def whole_rows(path: Path, size: int, num: int) -> list[Row]:
    """The rows of a file of num rows that was being written, `size` at a time; a block that is not whole is removed,
    and one with a damaged line with all after it."""
    if not path.exists():
        return []
    lines = whole_lines(path, "prompt", "scores")
    written = len(lines)
    kept = written if written >= num else written // size * size
    write_file(path, b"".join(lines[:kept]))
    return read_jsonl(path)


def scores_of(rows: Sequence[Row], name: str) -> Tensor:
    """The scores (P, n) of a judge, float64."""
    return torch.tensor([row["scores"][name] for row in rows], dtype=torch.float64)


def moments(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Mean and deviation of all scores of each judge and source, and the deviation within a prompt (root mean square):
    numbers for standard(SOURCE;MEAN;DEVIATION)."""
    found = {}
    for name in rows[0]["scores"]:
        values = scores_of(rows, name)
        deviations = {"deviation": values.std(correction=0), "deviation_within": values.var(1).mean().sqrt()}
        found[name] = {"mean": values.mean().item(), **{key: value.item() for key, value in deviations.items()}}
    return found


def best_rows(rows: Sequence[Row], *, keep_unfinished: bool) -> tuple[list[Row], dict[str, int]]:
    """Returns the best response to each prompt, and the counts: prompts, unfinished and empty (left out), kept."""
    kept, counts = [], {"prompts": len(rows), "unfinished": 0, "empty": 0, "kept": 0}
    for row in rows:
        scores = row["scores"]["reward"]
        best = max(range(len(scores)), key=scores.__getitem__)
        if not row["completions"][best].strip():
            counts["empty"] += 1
        elif not (row["finished"][best] or keep_unfinished):
            counts["unfinished"] += 1
        else:
            counts["kept"] += 1
            kept.append({"prompt": row["prompt"], "completion": row["completions"][best], "score": scores[best]})
    return kept, counts


def best_of_n(config: BestOfNConfig) -> Iterator[str]:
    """Draws and scores n responses to each prompt and writes the best; yields lines to print. Raises: as candidates."""
    judges = {"reward": config.reward} | ({"gold": config.gold} if config.gold else {})
    folder, output = OutputFolder(config, OURS), Path(config.output)
    rows = candidates(config, judges, folder)
    best, counts = best_rows(rows, keep_unfinished=config.keep_unfinished)
    points = curve(scores_of(rows, "reward"), {name: scores_of(rows, name) for name in judges})
    summary = {"n": config.n, "counts": counts, "moments": moments(rows), "best_of_k": points}
    write_jsonl(output / "best.jsonl", best)
    write_json(output / "summary.json", summary)
    folder.close()
    yield table(points, list(judges))
    yield "{kept} of {prompts} best responses kept; left out: {unfinished} cut off, {empty} empty".format(**counts)
    if counts["unfinished"] > counts["kept"]:
        yield "raise max_new_tokens, so that more of them end, or keep those cut off too (keep_unfinished)"


def table(points: Sequence[Row], names: Sequence[str]) -> str:
    """The points k = 1, 2, 4, ... and n as text."""
    lines = [f"{'k':>6}  {'KL <=':>6}  " + "  ".join(f"{name:>18}" for name in names)]
    for point in points:
        if point["k"] & (point["k"] - 1) == 0 or point is points[-1]:
            cells = [with_error(point[name], point[f"{name}_error"], ">10.4f") for name in names]
            lines.append(f"{point['k']:>6}  {point['kl']:>6.2f}  " + "  ".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)
