"""The tables of README.md (FRONT) and benchmarks/README.md (all), and the plot: python -m benchmarks.tables

With --check nothing is written, and the exit status says whether the texts are those of the files. With the paths of
CSV files it prints their tables.
"""

import csv
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PLOT = RESULTS / "cpu/speed.svg"

Row = dict[str, str]


class Headline(NamedTuple):
    """A line of the table of speed: how many times more of `figure` the peer needs than we do, and our goal."""

    what: str
    beside: str
    benchmark: str
    case: str
    theirs: str
    ours: str = "fastrlhf"
    figure: str = "median"
    goal: float | None = None
    missed: str = ""  # why, where the goal is not reached


class Limit(NamedTuple):
    """A line of the second table: the share of the machine's rate of copying or of matrix products that we reach."""

    what: str
    benchmark: str
    case: str
    goal: float
    ours: str = "fastrlhf"

    def share(self, row: Row) -> float:
        """Operations of matrix products are in the files as a share; bytes as a rate, beside that of a copy."""
        return float(row["matrix_share"]) if "matrix_share" in row else float(row["gb_s"]) / float(row["copy_gb_s"])


LOGITS, HEAD, TOKENS = "8x256x32000 float32", "2048x512x32000 float32", "64x1024 tokens, forward + backward"
PLAIN, BOTH = f"logprobs, {LOGITS}", f"logprobs + entropy, {LOGITS}"
BACK, IN_PLACE = f"logprobs and backward, {LOGITS}", "fastrlhf in place"
SFT, PAIRS, PPO = "10m, 64 sequences, loss of responses", "10m, 32 pairs", "10m, 16 prompts, 64 new tokens"
GROUPS = "10m, 2 prompts x 8, 64 new tokens"
GENERATION = "64 prompts, 3442 tokens"
PPO_HEAD, FULL = f"fwd+bwd with entropy, {HEAD}", "torch full logits"
HEADLINES = [
    Headline("`token_logprobs`", "TRL", "token_logprobs", PLAIN, "trl", goal=4.5),
    Headline("... with entropy", "TRL", "token_logprobs", BOTH, "trl", goal=12),
    Headline("... forward + backward, in place", "TRL", "token_logprobs", BACK, "trl", IN_PLACE, goal=8),
    Headline("... the same", "`torch.compile`", "token_logprobs", BACK, "torch.compile", IN_PLACE, goal=4),
    Headline("... into a fresh buffer", "TRL", "token_logprobs", BACK, "trl"),
    Headline("`gae`, 256 x 1024", "a loop over time", "gae", "256 x 1024", "loop over time", goal=100),
    *(
        Headline(f"`{loss}` forward + backward", beside, loss, TOKENS, theirs, goal=goal)
        for loss in ("ppo_policy_loss", "value_loss")
        for beside, theirs, goal in (("`torch.compile`", "torch.compile", 1.5), ("verl", "verl", 5))
    ),
    *(
        Headline(f"{what}`{op}` forward + backward", beside, op, case, theirs, figure=figure, goal=goal)
        for op, beside, case, theirs, goals in (
            ("linear_cross_entropy", "`F.linear_cross_entropy`", f"fwd+bwd, {HEAD}", "F.linear_cross_entropy", (1, 10)),
            ("linear_ppo_loss", "full logits", PPO_HEAD, FULL, (1.4, 10)),
            ("linear_token_logprobs", "full logits", f"fwd+bwd, {HEAD}", FULL, (None, None)),
        )
        for what, figure, goal in (("", "median", goals[0]), ("extra memory of ", "extra_mib", goals[1]))
    ),
    Headline(
        "packed forward + backward",
        "padding in random order",
        "packing",
        "24 sequences, 3106 tokens",
        "padded, random order",
        "fastrlhf, packed",
    ),
    *(
        Headline("generation", beside, "generation", case, theirs, goal=goal)
        for beside, case, theirs, goal in (
            ("`generate`", GENERATION, "generate, dynamic cache", 3),
            ("`generate`, static cache", GENERATION, "generate, static cache", None),
            ("`generate_batch`", f"{GENERATION}, continuous batching", "generate_batch", None),
        )
    ),
    Headline("SFT", "TRL 1.16, padding_free", "sft", SFT, "trl", goal=1.7),
    Headline("reward model", "TRL 1.16", "reward", PAIRS, "trl", goal=2.8),
    Headline("DPO", "TRL 1.16", "dpo", PAIRS, "trl", goal=3.5),
    Headline("PPO, an iteration", "TRL 1.12", "ppo", PPO, "trl", goal=2.2),
    Headline("GRPO, an iteration", "TRL 1.16", "groups", GROUPS, "trl"),
    Headline("... the same", "prompts read with each response", "groups", GROUPS, "fastrlhf, prompts apart"),
    *(
        Headline(f"peak memory of {what}", beside, benchmark, case, "trl", figure="process_peak_mib", goal=1)
        for what, beside, benchmark, case in (
            ("SFT", "TRL 1.16, padding_free", "sft", SFT),
            ("reward model", "TRL 1.16", "reward", PAIRS),
            ("DPO", "TRL 1.16", "dpo", PAIRS),
            ("PPO", "TRL 1.12", "ppo", PPO),
        )
    ),
]

# what README.md shows, one that is slower among them; the rest is in benchmarks/README.md
FRONT = [
    ("SFT", "TRL 1.16, padding_free"),
    ("DPO", "TRL 1.16"),
    ("PPO, an iteration", "TRL 1.12"),
    ("peak memory of PPO", "TRL 1.12"),
    ("generation", "`generate`"),
    ("`linear_token_logprobs` forward + backward", "full logits"),
]

LIMITS = [
    Limit("`token_logprobs`, of a copy", "token_logprobs", PLAIN, 0.45),
    Limit("`gae`, of a copy (it fits in caches)", "gae", "256 x 1024", 0.5),
    Limit("SFT, of matrix products", "sft", SFT, 0.6),
    Limit("... of SmolLM2's shape", "sft", "135m, 8 sequences, loss of responses", 0.75),
    Limit("PPO, an iteration, of matrix products", "ppo", PPO, 0.6),
]


def rows_in(path: Path) -> list[Row]:
    """The rows of a CSV file, which may be of several benchmarks."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read(*paths: Path) -> dict[str, list[Row]]:
    """The rows of each benchmark; of all that were run on a CPU if no file is named."""
    rows = [row for path in paths or sorted((RESULTS / "cpu").glob("*.csv")) for row in rows_in(path)]
    names = sorted({row["benchmark"] for row in rows})
    return {name: [row for row in rows if row["benchmark"] == name] for name in names}


def headlines(files: dict[str, list[Row]]) -> list[tuple[Headline, float | None]]:
    """Each headline with its ratio; None where one side was not measured, as where the peer is not installed."""
    results = []
    for line in HEADLINES:
        rows = {row["name"]: row for row in files.get(line.benchmark, []) if row["case"] == line.case}
        figures = [rows.get(name, {}).get(line.figure) for name in (line.theirs, line.ours)]
        results.append((line, float(figures[0]) / float(figures[1]) if all(figures) else None))
    return results


def peer(files: dict[str, list[Row]], line: Headline) -> str:
    """What a headline is beside, with the version that was measured."""
    row = files.get(line.benchmark, [{}])[0]
    versions = dict(part.split(" ", 1) for part in row.get("peers", "").split(", ") if part)
    return f"{line.beside} {versions[line.theirs]}" if line.theirs in versions else line.beside


def slower(files: dict[str, list[Row]]) -> str:
    """The sentence on every comparison in which the other one is faster."""
    rows = [row for rows in files.values() for row in rows if not row["name"].startswith("fastrlhf")]
    behind = sorted((float(row["ratio"]), row["benchmark"], row["case"], row["name"]) for row in rows)
    behind = [row for row in behind if row[0] < 1]
    texts = [f"`{benchmark}`, {case}: {name} takes {ratio:.2g}x" for ratio, benchmark, case, name in behind]
    head = f"Of {len(rows)} comparisons, those in which the other one takes less time than ours"
    return f"{head}: {'; '.join(texts) or 'none'}."


def below(files: dict[str, list[Row]]) -> str:
    """The sentences on every ratio that is below its goal."""
    missed = []
    for line, ratio in headlines(files):
        if ratio is not None and line.goal is not None and float(f"{ratio:.3g}") < line.goal:  # as the table has it
            what = line.what.replace("...", f"`{line.benchmark}`")
            missed.append(f"{what} is at {ratio / line.goal:.0%} of its goal: {line.missed or 'why is not known'}.")
    return " ".join(missed) or "No figure is below its goal."


def generation(files: dict[str, list[Row]]) -> str:
    """The sentence on generation beside the limits of the machine."""
    rows = {row["name"]: row for row in files.get("generation", []) if row["case"] == GENERATION}
    if not rows:
        return "Generation was not measured."
    ours, theirs = rows["fastrlhf"], rows["generate, dynamic cache"]
    memory, products, took = (float(ours[name]) for name in ("memory_limit_ms", "product_limit_ms", "median"))
    tokens = [f"{float(row['tokens_per_s']):.0f}" for row in (ours, theirs)]
    return (
        f"Generation gives {tokens[0]} useful tokens a second (`generate`: {tokens[1]}), in {took:.0f} ms. Its matrix "
        f"products alone take {products:.0f} ms at the rate of a large one; reading weights, keys and values, if every "
        f"step had all rows in it, {memory:.0f} ms at the rate of a copy: together {(memory + products) / took:.0%} of "
        "the time."
    )


def number(text: str) -> str:
    """Three digits; nothing for nothing."""
    return f"{float(text):.3g}" if text else ""


def machine(row: Row) -> str:
    """What a table was measured on, and the limits of that machine."""
    versions = f"torch {row['torch']}, commit {row['commit']}, {row['when'][:10]}"
    limits = f"copy {row['copy_gb_s']} GB/s, matrix product {row['matrix_gflop_s']} GFLOP/s"
    if "matrix_bf16_gflop_s" in row:
        limits += f" (bf16: {row['matrix_bf16_gflop_s']})"
    return f"{row['processor']} ({row['isa']}), {row['threads']} threads, {versions}; {limits}"


def front(files: dict[str, list[Row]]) -> str:
    """The table of README.md: six of the lines."""
    lines = ["| what | beside | ratio |", "|---|---|---|"]
    shown = {(line.what, line.beside): (peer(files, line), ratio) for line, ratio in headlines(files)}
    for what, beside in FRONT:
        name, ratio = shown[what, beside]
        lines.append(f"| {what} | {name} | {'not measured' if ratio is None else f'{ratio:.3g}x'} |")
    return "\n".join(lines)


def speed(files: dict[str, list[Row]]) -> str:
    """The table of all headlines."""
    lines = ["| what | beside | ratio | goal | benchmark |", "|---|---|---|---|---|"]
    for line, ratio in headlines(files):
        shown = "not measured" if ratio is None else f"{ratio:.3g}x"
        goal = "" if line.goal is None else f"{line.goal:g}x"
        lines.append(f"| {line.what} | {peer(files, line)} | {shown} | {goal} | `{line.benchmark}`: {line.case} |")
    return "\n".join(lines)


def limits(files: dict[str, list[Row]]) -> str:
    """The table of what the machine allows."""
    lines = ["| what | reached | goal | benchmark |", "|---|---|---|---|"]
    for line in LIMITS:
        rows = {row["name"]: row for row in files.get(line.benchmark, []) if row["case"] == line.case}
        shown = f"{line.share(rows[line.ours]):.0%}" if line.ours in rows else "not measured"
        lines.append(f"| {line.what} | {shown} | {line.goal:.0%} | `{line.benchmark}`: {line.case} |")
    return "\n".join(lines)


def whole(files: dict[str, list[Row]]) -> str:
    """The tables of benchmarks/README.md: every measurement."""
    blocks = []
    for name, rows in files.items():
        first = list(rows[0])
        figures = [f for f in first[first.index("ratio") + 1 : first.index("processor")] if any(row[f] for row in rows)]
        lines = [f"### {name}", machine(rows[0]), ""]
        lines.append("| " + " | ".join(["case", "", "ms", "20 to 80 %", "ratio", *figures]) + " |")
        lines.append("|---|---" + "|---:" * (3 + len(figures)) + "|")
        for case, group in groupby(rows, key=lambda row: row["case"]):
            for place, row in enumerate(group):
                cells = [case if place == 0 else "", row["name"], number(row["median"])]
                cells += [f"{number(row['p20'])} to {number(row['p80'])}", number(row["ratio"])]
                lines.append("| " + " | ".join([*cells, *(number(row[figure]) for figure in figures)]) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def plot(files: dict[str, list[Row]]) -> None:
    """The headlines as bars."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    results = [(line, ratio) for line, ratio in headlines(files)[::-1] if ratio is not None]
    with rc_context({"svg.hashsalt": "fastrlhf", "svg.fonttype": "none"}):  # the same file from the same figures
        figure = Figure(figsize=(8, 0.42 * len(results) + 0.8), layout="constrained")
        axis = figure.add_subplot()
        labels = [f"{line.what.replace('`', '')}\nbeside {line.beside.replace('`', '')}" for line, _ in results]
        bars = axis.barh(labels, [ratio for _, ratio in results], color="#1f6fb4")
        axis.bar_label(bars, [f"{ratio:.3g}x" for _, ratio in results], padding=3)
        axis.set_xscale("log")
        axis.axvline(1, color="#8a8f98", linewidth=1)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_xlabel("times more than fastrlhf needs")
        axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(PLOT, metadata={"Date": None})


def between(text: str, name: str, table: str) -> str:
    """The text with the table in the place that is marked for it."""
    begin, end = f"<!-- {name}: python -m benchmarks.tables -->\n", f"\n<!-- end {name} -->"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"tables: the marks of {name!r} are missing")
    return head + begin + table + end + tail


def texts() -> Iterable[tuple[Path, str]]:
    """The two pages as they should be."""
    files = read()
    front_page, page = HERE.parent / "README.md", HERE / "README.md"
    yield front_page, between(front_page.read_text(), "speed", front(files))
    text = page.read_text()
    for name, of in (
        ("speed", speed),
        ("slower", slower),
        ("generation", generation),
        ("limits", limits),
        ("below", below),
        ("results", whole),
    ):
        text = between(text, name, of(files))
    yield page, text


def write() -> None:
    for path, text in texts():
        path.write_text(text)
    plot(read())


def main() -> None:
    if paths := [Path(argument) for argument in sys.argv[1:] if argument != "--check"]:
        print(whole(read(*paths)))
    elif "--check" not in sys.argv[1:]:
        write()
    elif stale := [str(path) for path, text in texts() if path.read_text() != text]:
        sys.exit(f"tables: not what the CSV files say: {', '.join(stale)}")


if __name__ == "__main__":
    main()
