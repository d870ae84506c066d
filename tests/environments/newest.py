"""What `make test-newest` runs in its environment: the suite, then tests/peers on the newest releases of the peers.

    .venv-newest/bin/python tests/environments/newest.py [what pytest is to be given for the suite]

At the end it says which versions are not those of the lock, what of the peers cannot be installed, and which tests
fail, which is what the new versions break. Exit status 1 if one fails, or a peer was not compared.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
LOCKS = ("lock.txt", "triton.txt")
PIP = [sys.executable, "-m", "pip", "install", "--quiet"]
# peer -> its tests, and the plugin that stands in for what cannot be installed
PEERS = {
    "trl": (["test_trl.py", "test_trl_losses.py", "test_trl_ppo.py", "test_training.py"], []),
    "openrlhf": (["test_openrlhf.py"], ["-p", "peer_openrlhf"]),
    "verl": (["test_verl.py"], ["-p", "peer_verl"]),
}
UNDECLARED = {"verl": ["orjson"]}  # what a peer imports and does not require
# the Python that all peers have a wheel for: not every release is for the newest, though its files are Python alone
WHEELS_FOR = "3.11"
SOURCES = "antlr4-python3-runtime"  # of Hydra: Python alone, without a wheel
Outcome = tuple[int, list[str]]  # how many tests passed, which failed


def main() -> int:
    differ = list(differences())
    outcomes = {"the suite": pytest(*sys.argv[1:])}
    lacks = []
    for peer, (files, plugins) in PEERS.items():
        lacks += list(install(peer))
        # what a peer and its requirements warn of is no failure of ours
        outcomes[peer] = pytest("-W", "default", *plugins, *(f"tests/peers/{file}" for file in files))
    print(f"\n{'':-^100}\nPython {platform.python_version()}; versions that are not the lock's:", *differ, sep="\n  ")
    print("\nof the peers cannot be installed here:", *(lacks or ["nothing"]), sep="\n  ")
    print("\ntests:")
    for what, (passed, failed) in outcomes.items():
        release = f" {version(what)}" if what in PEERS else ""
        print(f"  {what}{release}: {passed} passed, {len(failed)} failed", *failed, sep="\n    breaks: ")
    return int(any(failed or not passed for passed, failed in outcomes.values()))


def differences() -> Iterator[str]:
    """A line for each package of the lock that has another version here, and for torch."""
    yield f"torch {version('torch')}"
    for line in "".join((ROOT / "requirements" / name).read_text() for name in LOCKS).splitlines():
        name, _, locked = line.partition("==")
        if version(name) != locked:
            yield f"{name} {locked} -> {version(name)}"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def install(peer: str) -> Iterator[str]:
    """Installs a peer and those of its requirements that have wheels and leave all that is here as it is; yields what
    cannot be."""
    there = ["--upgrade", "--target", sysconfig.get_path("purelib")]
    newest = ["--no-deps", "--only-binary=:all:", f"--python-version={WHEELS_FOR}"]
    if subprocess.run([*PIP, *newest, *there, peer], check=False).returncode:
        yield f"{peer}: no release has a wheel"
        return
    wants, tag = importlib.metadata.metadata(peer)["Requires-Python"] or "", _tag(peer)
    if not SpecifierSet(wants).contains(platform.python_version()) or not tag.startswith("py"):
        yield f"{peer} as such: it is for Python {wants}, as {tag}; its files, which are Python, were taken"
    for text in [*(importlib.metadata.requires(peer) or []), *UNDECLARED.get(peer, [])]:
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            yield from (f"{peer} requires {reason}" for reason in missing(wanted))


def missing(wanted: Requirement) -> Iterator[str]:
    """Installs a requirement; yields why not if it cannot be."""
    here = version(wanted.name)
    if here != "missing":
        if not wanted.specifier.contains(here, prereleases=True):
            yield f"{wanted}, and {here} is here"
        return
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as kept:
        freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable", "--exclude", "torch"]
        pins = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
        kept.write("\n".join(line for line in pins.splitlines() if re.match(r"\S+==", line)))
        kept.write(f"\ntorch=={version('torch')}\n")
        kept.flush()
        command = [
            *PIP,
            "--only-binary=:all:",
            f"--no-binary={SOURCES}",
            "-c",
            kept.name,
            f"{wanted.name}{_extras(wanted)}{wanted.specifier}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        yield f"{wanted}: {lines[-1].removeprefix('ERROR: ') if lines else 'pip fails'}"


def _tag(package: str) -> str:
    """The tag of the wheel that a package came from, as py3-none-any."""
    wheel = importlib.metadata.distribution(package).read_text("WHEEL") or ""
    return next(iter(re.findall(r"^Tag: (.*)", wheel, re.MULTILINE)), "")


def _extras(wanted: Requirement) -> str:
    return f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""


def pytest(*arguments: str) -> Outcome:
    """Runs pytest in the root."""
    paths = os.pathsep.join([str(ROOT / "tests" / "peers"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths.strip(os.pathsep)}, check=False)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    passed = [case for case in cases if case not in failed and case.find("skipped") is None]
    names = sorted({f"{case.get('classname')}.{case.get('name')}" for case in failed})
    if done.returncode > 1 or (done.returncode and not names):
        names.append(f"pytest ended with status {done.returncode}")
    return len(passed), names


if __name__ == "__main__":
    sys.exit(main())
