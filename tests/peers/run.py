"""Trainers' own tests, plain and with `fastrlhf.patch`, from checkouts of them:

    python -m tests.peers.run --trl CHECKOUT --verl CHECKOUT... --openrlhf CHECKOUT [--write tests/peers/TALLIES.md]

Prints both tallies, the tests that only pass plain, and how often each replacement was called. Exit status 1 if there
is such a test, or if nothing passed plain. Needs pytest and what the trainers need in the environment that runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from tests.peers.tallies import Run, Tally, document

ROOT = Path(__file__).parents[2]
TRL_TRAINERS = ("sft", "dpo", "rloo", "kto", "grpo")
TRL_LOSSES = ("cpo", "orpo", "tpo", "bco", "sdft", "sdpo", "ssd", "a2po")  # those that import what we replace
VERL_CPU = (
    "core_algos",
    "reinforce_pp_multiturn",
    "loss_aggregation",
    "dynamic_policy_losses",
    "value_loss_normalization",
)
# peer -> (the tests that exercise what we replace and need neither network nor GPU, in batches of one process each,
#          plugins that stand in for the rest); TRL's take the longest
DEFAULTS = {
    "verl": (
        [
            [f"tests/trainer/ppo/test_{name}_on_cpu.py" for name in VERL_CPU]
            + [f"tests/trainer/ppo/test_{name}.py" for name in ("rollout_corr", "rollout_corr_integration")]
            + ["tests/trainer/test_multi_trajectories_advantage_on_cpu.py", "tests/utils/test_torch_functional.py"]
            + ["tests/models/test_fused_kernels_ulysses_sp_on_cpu.py"]
        ],
        ["peer_verl"],
    ),
    # these load OpenRLHF's files by path, so no replacement is called: they show that a patched process still works
    "openrlhf": ([[f"tests/test_{name}.py" for name in ("experience", "loss_aggregation")]], ["peer_openrlhf"]),
    "trl": (
        [["tests/test_utils.py"]]
        + [[f"tests/experimental/test_{name}_trainer.py" for name in TRL_LOSSES]]
        + [[f"tests/test_{name}_trainer.py"] for name in TRL_TRAINERS],
        ["peer_hub"],
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for peer in DEFAULTS:
        parser.add_argument(f"--{peer}", nargs="+", type=Path, default=[], metavar="CHECKOUT")
    parser.add_argument("--tests", nargs="+", help="test files instead of the default ones")
    parser.add_argument("--select", default="", help="pytest's -k")
    parser.add_argument("--write", type=Path, help="a Markdown file for the tallies, written anew after each batch")
    options = parser.parse_args()
    checkouts = [(peer, path) for peer in DEFAULTS for path in getattr(options, peer)]
    if not checkouts:
        parser.error("give at least one checkout")
    tallies: list[Tally] = []
    for peer, path in checkouts:
        batches, plugins = DEFAULTS[peer]
        tallies.append(tally := Tally(peer, path))
        for batch in [options.tests] if options.tests else batches:
            found = [t for t in batch if (path / t.split("::")[0]).exists()]
            if not found:
                continue
            tally.tests += found
            for kind, run in (("plain", tally.plain), ("patched", tally.patched)):
                run_batch(run, peer, path, found, plugins, kind, options.select)
            if options.write:
                options.write.write_text(document(tallies))
        print(tally.text(), flush=True)
    return int(any(tally.lost or "passed" not in tally.plain.outcomes.values() for tally in tallies))


def run_batch(run: Run, peer: str, path: Path, tests: list[str], plugins: list[str], kind: str, select: str) -> None:
    """Adds to `run` what the tests in the checkout at `path` give, and what of ours they call."""
    with tempfile.TemporaryDirectory() as folder:
        report, called = Path(folder, "report.xml"), Path(folder, "called.json")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "--continue-on-collection-errors"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
        for plugin in [*plugins, *(["peer_patched"] if kind == "patched" else [])]:
            command += ["-p", plugin]
        paths = os.pathsep.join(map(str, (ROOT / "tests/peers", ROOT, path.resolve())))
        here = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        here |= {"PEER": peer, "PEER_CALLED": str(called)}
        command += [*tests, *(["-k", select] if select else [])]
        start = time.perf_counter()
        # what pytest prints goes to stderr, so that stdout holds the tallies
        subprocess.run(command, cwd=path, env={**os.environ, **here}, stdout=sys.stderr)
        run.seconds += time.perf_counter() - start
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else []:
            name = f"{case.get('classname')}.{case.get('name')}"
            run.outcomes[name] = outcome_of(case)
            if run.outcomes[name] == "failed":
                run.errors[name] = error_of(case)
        if called.exists():
            run.add_calls(**json.loads(called.read_text()))


def outcome_of(case: ElementTree.Element) -> str:
    tags = {child.tag for child in case}
    return "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"


def error_of(case: ElementTree.Element) -> str:
    """The name of the exception that a test failed with."""
    message = next(child.get("message", "") for child in case if child.tag in ("failure", "error"))
    return message.splitlines()[0].split(":")[0].rsplit(".", 1)[-1] if message else "an error"


if __name__ == "__main__":
    sys.exit(main())
