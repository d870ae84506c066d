"""The short form of the campaign of faults: tests/faults, which CONTRIBUTING.md describes, in a process of its own."""

import json
import os
import subprocess
import sys
from collections import Counter

from loops import ROOT

SHORT = ["--kills=2", "--overwriting=0", "--pairs=1", "--sample=0.02", "--commands=sft,label"]


def test_nothing_is_lost_in_a_sample_of_the_faults(tmp_path):
    command = [sys.executable, str(ROOT / "tests/faults"), *SHORT, f"--output={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()[1:]]
    trials = [trial for trial in trials if "ended" in trial]
    assert done.returncode == 0, [trial for trial in trials if trial["is_bad"]] or done.stdout + done.stderr
    numbers = Counter(trial["kind"] for trial in trials)
    assert set(numbers) == {"kills", "pairs", "files", "rows", "servers"}
    assert numbers["kills"] == 4 <= sum(trial["kills"] for trial in trials)
