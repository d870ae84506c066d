"""A peer's own tests, plain and with `fastrlhf.patch`: python -m tests.peers.run --peer trl --path CHECKOUT

Prints both tallies, the tests that only pass plain, and how often each replacement was called. Exit status 1 if there
is such a test, or if nothing passed plain. Needs pytest and what the peer needs in the environment that runs it.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
# peer -> (the tests that exercise what we replace and need neither network nor GPU, plugins that stand in for the rest)
DEFAULTS = {
    "trl": (
        [f"tests/test_{name}.py" for name in ("utils", "sft_trainer", "dpo_trainer", "grpo_trainer", "rloo_trainer")],
        ["peer_hub"],
    ),
    "verl": (
        [f"tests/trainer/ppo/test_{name}_on_cpu.py" for name in ("core_algos", "reinforce_pp_multiturn")]
        + [f"tests/trainer/ppo/test_{name}.py" for name in ("rollout_corr", "rollout_corr_integration")]
        + ["tests/trainer/test_multi_trajectories_advantage_on_cpu.py", "tests/utils/test_torch_functional.py"]
        + ["tests/models/test_fused_kernels_ulysses_sp_on_cpu.py"],
        ["peer_verl"],
    ),
    # these load OpenRLHF's files by path, so no replacement is called: they show that a patched process still works
    "openrlhf": ([f"tests/test_{name}.py" for name in ("experience", "loss_aggregation")], ["peer_openrlhf"]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, choices=DEFAULTS)
    parser.add_argument("--path", required=True, type=Path, help="a checkout of the peer")
    parser.add_argument("--tests", nargs="+", help="test files instead of the default ones")
    parser.add_argument("--select", default="", help="pytest's -k")
    options = parser.parse_args()
    tests, plugins = DEFAULTS[options.peer]
    tests = [t for t in options.tests or tests if (options.path / t.split("::")[0]).exists()]
    plain, _ = outcomes(options, tests, plugins, patched=False)
    patched, calls = outcomes(options, tests, plugins, patched=True)
    lost = sorted(name for name, outcome in plain.items() if outcome == "passed" and patched.get(name) != "passed")
    print(f"{options.peer}, {len(tests)} test files")
    for what, found in (("plain", plain), ("patched", patched)):
        counts = collections.Counter(found.values())
        print(f"{what:<8}" + "  ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped")))
    print("\n".join(f"{count:>8} calls of {path}" for path, count in calls.items()))
    print("\n".join(f"passes plain, not patched: {name}" for name in lost) or "patched passes all that plain passes")
    return int(bool(lost) or "passed" not in plain.values())


def outcomes(
    options: argparse.Namespace, tests: list[str], plugins: list[str], patched: bool
) -> tuple[dict[str, str], dict[str, int]]:
    """Test -> passed, failed or skipped, and replaced function -> calls."""
    with tempfile.TemporaryDirectory() as folder:
        report, calls = Path(folder, "report.xml"), Path(folder, "calls.json")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=no",
            "--continue-on-collection-errors",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
        ]
        for plugin in [*plugins, *(["peer_patched"] if patched else [])]:
            command += ["-p", plugin]
        path = os.pathsep.join(map(str, (ROOT / "tests/peers", ROOT, options.path.resolve())))
        here = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        here |= {"PEER": options.peer, "PEER_CALLS": str(calls)}
        command += [*tests, *(["-k", options.select] if options.select else [])]
        subprocess.run(command, cwd=options.path, env={**os.environ, **here})
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else []
        found = {f"{case.get('classname')}.{case.get('name')}": outcome_of(case) for case in cases}
        return found, json.loads(calls.read_text()) if calls.exists() else {}


def outcome_of(case: ElementTree.Element) -> str:
    tags = {child.tag for child in case}
    return "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"


if __name__ == "__main__":
    sys.exit(main())
