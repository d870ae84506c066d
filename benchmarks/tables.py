"""The tables and the plot of README.md and benchmarks/README.md, from the CSV files: python -m benchmarks.tables

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
    """A line of the front page: how many times more of `figure` the peer needs than we do."""

    what: str
    beside: str
    benchmark: str
    case: str
    ours: str
    theirs: str
    figure: str = "median"


TRL = "TRL 1.16"
LOGITS, HEAD = "8x256x32000 float32", "2048x512x32000 float32"
HEADLINES = [
    Headline("`token_logprobs`", TRL, "token_logprobs", f"logprobs, {LOGITS}", "fastrlhf", "trl"),
    Headline("... with entropy", TRL, "token_logprobs", f"logprobs + entropy, {LOGITS}", "fastrlhf", "trl"),
    Headline(
        "... forward + backward, in place",
        TRL,
        "token_logprobs",
        f"logprobs and backward, {LOGITS}",
        "fastrlhf in place",
        "trl",
    ),
    Headline("... into a fresh buffer", TRL, "token_logprobs", f"logprobs and backward, {LOGITS}", "fastrlhf", "trl"),
    Headline("`gae`, 256 x 1024", "a loop over time", "gae", "256 x 1024", "fastrlhf", "loop over time"),
    Headline(
        "packed forward + backward",
        "padding in random order",
        "packing",
        "24 sequences, 3854 tokens",
        "fastrlhf, packed",
        "padded, random order",
    ),
    Headline(
        "generation",
        "`generate`, static cache",
        "generation",
        "64 prompts, 4049 tokens",
        "fastrlhf",
        "generate, static cache",
    ),
    Headline("SFT", f"{TRL}, padding_free", "sft", "10m, 64 sequences, loss of responses", "fastrlhf", "trl"),
    Headline(
        "... loss of all tokens",
        f"{TRL}, padding_free",
        "sft",
        "10m, 64 sequences, loss of all tokens",
        "fastrlhf",
        "trl",
    ),
    Headline("reward model", TRL, "reward", "10m, 32 pairs", "fastrlhf", "trl"),
    Headline("PPO, an iteration", "TRL 1.12", "ppo", "10m, 16 prompts, 64 new tokens", "fastrlhf", "trl"),
    Headline(
        "memory of `linear_token_logprobs`",
        "full logits",
        "linear_token_logprobs",
        f"fwd+bwd, {HEAD}",
        "fastrlhf",
        "torch full logits",
        "peak_mib",
    ),
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
    """Each headline whose benchmark has a file, with its ratio; None where one side was not measured."""
    results = []
    for line in HEADLINES:
        if line.benchmark not in files:
            continue
        rows = {row["name"]: row for row in files[line.benchmark] if row["case"] == line.case}
        measured = {line.ours, line.theirs} <= rows.keys()
        ratio = float(rows[line.theirs][line.figure]) / float(rows[line.ours][line.figure]) if measured else None
        results.append((line, ratio))
    return results


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
    """The table of README.md."""
    lines = ["| what | beside | ratio | benchmark |", "|---|---|---|---|"]
    for line, ratio in headlines(files):
        shown = "not measured" if ratio is None else f"{ratio:.3g}x"
        lines.append(f"| {line.what} | {line.beside} | {shown} | `{line.benchmark}`: {line.case} |")
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
    for path, name, table in (
        (HERE.parent / "README.md", "speed", front(files)),
        (HERE / "README.md", "results", whole(files)),
    ):
        yield path, between(path.read_text(), name, table)


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
