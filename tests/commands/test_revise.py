"""`fastrlhf revise`: what the model reads, what is kept of what it writes, and a run that is stopped."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from loops import model_folder, write_rows

from fastrlhf.cli.main import main
from fastrlhf.commands.feedback.constitution import Principle, draw, load_principles
from fastrlhf.commands.feedback.revise import Revise
from fastrlhf.data import Reason, load_demonstrations, load_pairs
from fastrlhf.data.template import load_tokenizer
from fastrlhf.errors import DataError
from fastrlhf.generation.sampling import Sample
from fastrlhf.runtime.jsonl import read_jsonl
from fastrlhf.settings.feedback import ReviseConfig

pytestmark = pytest.mark.usefixtures("one_thread")
PRINCIPLES = "- {name: calm, critique: how is it loud, revision: say it calmly.}\n"


class Scripted:
    """An engine that writes what a script makes of the text that it reads."""

    def __init__(self, script, tokenizer):
        self.script, self.tokenizer, self.read, self.seeds = script, tokenizer, [], []

    def generate(self, prompts, sampling, *, seeds, progress):
        texts = [self.tokenizer.decode(tokens) for tokens in prompts]
        self.read += texts
        self.seeds += seeds
        samples = []
        for tokens, text in zip(prompts, texts, strict=True):
            written, finished = self.script(text)
            ids = self.tokenizer(written, add_special_tokens=False).input_ids
            samples.append(Sample(tokens, ids or [1], [0.0] * len(ids), [0.0] * len(ids), finished))
        return samples


def script(text):
    """The response r, critiques c1, c2, ... and revisions v1, v2, ..."""
    last = text.removesuffix("<|assistant|>").removesuffix("<eos>").rpartition("<|user|>")[2]
    answers = text.count("v1") + 1
    return (f"c{answers}" if "loud" in last else f" v{answers} " if "calmly" in last else "r"), "loud" not in last


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "principles.yaml").write_text(PRINCIPLES)
    return {
        "model": model_folder(tmp_path / "model"),
        "data": write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"q{n}", "topic": n} for n in range(3)]),
        "output": str(tmp_path / "revised"),
        "principles": str(tmp_path / "principles.yaml"),
        "max_new_tokens": 6,
        "device": "cpu",
    }


def scripted(settings, script=script, **changes):
    """A run with a scripted engine, to its end, and what the engine read."""
    run = Revise(ReviseConfig(**{**settings, **changes}))
    run.engine = Scripted(script, load_tokenizer(settings["model"]))
    list(run)
    return run.engine


def rows(settings, name):
    return read_jsonl(Path(settings["output"]) / f"{name}.jsonl")


def test_the_model_reads_its_response_then_its_critique_and_a_second_round_starts_from_the_revision(settings):
    engine = scripted(settings, rounds=2, limit=1)
    turns = "<|user|>q0<eos>", "<|assistant|>r<eos>", "<|user|>how is it loud<eos>", "<|assistant|>c1<eos>"
    last = "<|user|>say it calmly. Reply with the rewritten response alone, as if it were your first.<eos>"
    again = [turn.replace("r<", "v1<").replace("c1", "c2") for turn in turns]
    assert engine.read == [
        f"{turns[0]}<|assistant|>",
        f"{''.join(turns[:3])}<|assistant|>",
        f"{''.join(turns)}{last}<|assistant|>",
        f"{''.join(again[:3])}<|assistant|>",
        f"{''.join(again)}{last}<|assistant|>",
    ]
    assert len(set(engine.seeds)) == 5
    (transcript,) = rows(settings, "transcripts")
    assert transcript == {
        "prompt": "q0",
        "response": "r",
        "finished": True,
        "rounds": [
            {"principle": "calm", "critique": f"c{n}", "critique_finished": False, "revision": f"v{n}"} for n in (1, 2)
        ],
    }


def test_the_last_revision_is_a_demonstration_and_is_preferred_to_the_first_response(settings):
    scripted(settings, rounds=2)
    assert rows(settings, "demonstrations")[1] == {"prompt": "q1", "completion": "v2", "topic": 1}
    sides = {"prompt": "q1", "chosen": "v2", "rejected": "r", "rejected_finished": True}
    assert rows(settings, "pairs")[1] == {**sides, "rater": "revision", "topic": 1}
    tokenizer = load_tokenizer(settings["model"])
    for load, name in ((load_demonstrations, "demonstrations"), (load_pairs, "pairs")):
        loaded = load(Path(settings["output"]) / f"{name}.jsonl", tokenizer, max_tokens=64)
        assert len(loaded.rows) == 3


def test_given_responses_are_revised_and_pairs_are_left_out_on_demand(settings, tmp_path):
    given = [{"prompt": "q", "completion": "r", "finished": False}, {"prompt": "p", "completion": "v1"}]
    data = write_rows(tmp_path / "given.jsonl", given)
    engine = scripted(settings, lambda text: ("v1", True), data=data, given=True, pairs=False)
    assert len(engine.read) == 4
    assert [row["completion"] for row in rows(settings, "demonstrations")] == ["v1", "v1"]
    assert not (Path(settings["output"]) / "pairs.jsonl").exists()
    # the revision is not cut off because the first response was
    assert [row.get("finished", True) for row in rows(settings, "demonstrations")] == [True, True]
    assert [row["finished"] for row in rows(settings, "transcripts")] == [False, True]
    summary = json.loads((Path(settings["output"]) / "summary.json").read_text())
    assert (summary["unchanged"], summary["pairs"], summary["principles"]) == (1, 0, {"calm": 2})


def test_what_cannot_be_used_is_rejected_by_reason(settings):
    def unwilling(text):
        written, finished = script(text)
        if "q0" in text and written == "c1":
            return " ", True
        return written, finished and not ("q1" in text and "v" in written)

    with pytest.raises(DataError, match="2 of 3 rows rejected"):
        scripted(settings, unwilling)
    scripted(settings, unwilling, max_rejected=0.7, overwrite=True)
    summary = json.loads((Path(settings["output"]) / "summary.json").read_text())
    assert summary["rejected"] == {Reason.EMPTY_RESPONSE: 1, Reason.CUT_OFF: 1}
    assert [row["prompt"] for row in rows(settings, "demonstrations")] == ["q2"]


def test_a_conversation_that_outgrows_the_context_is_rejected(settings):
    with pytest.raises(DataError, match=r"prompt and response too long.*revise, round 1: \d+ tokens.*is 256"):
        scripted(settings, lambda text: ("x" * 100, True), max_new_tokens=100)


def test_without_a_chat_template_the_transcript_is_text_and_ends_at_the_next_heading(settings, tmp_path):
    def writes(text):
        return " r\n\nHuman: more" if "request" not in text else " x\n\nCritique: y", True

    model = model_folder(tmp_path / "plain", chat=False)
    engine = scripted({**settings, "model": model}, writes, limit=1)
    asked = "q0 r\n\nCritique request: how is it loud\n\nCritique:"
    assert engine.read == ["q0", asked, f"{asked} x\n\nRevision request: say it calmly.\n\nRevision:"]
    assert rows(settings, "demonstrations") == [{"prompt": "q0", "completion": " x", "topic": 0}]


def test_a_stopped_run_ends_as_one_that_was_not(settings, tmp_path):
    settings |= {"rounds": 2, "max_rejected": 0.9, "max_new_tokens": 4}
    settings["data"] = write_rows(tmp_path / "more.jsonl", [{"prompt": f"question {n}"} for n in range(8)])
    finish(settings, output=str(tmp_path / "whole"))
    stopped = iter(loose(Revise(ReviseConfig(**settings))))
    next(stopped), next(stopped)
    stopped.close()
    assert (Path(settings["output"]) / "round-1.jsonl").exists()
    write_rows(settings["data"], [{"prompt": f"other {n}"} for n in range(8)])
    with pytest.raises(ValueError, match="has changed since the run began"):
        finish(settings, resume=True)
    write_rows(settings["data"], [{"prompt": f"question {n}"} for n in range(8)])
    finish(settings, resume=True)
    for name in ("responses", "round-1", "round-2", "demonstrations", "transcripts"):
        found = (Path(settings["output"]) / f"{name}.jsonl").read_bytes()
        assert found == (tmp_path / "whole" / f"{name}.jsonl").read_bytes(), name


class Ending:
    """An engine whose responses all count as finished: random models seldom end what they write."""

    def __init__(self, engine):
        self.engine = engine

    def generate(self, *args, **options):
        return [dataclasses.replace(sample, finished=True) for sample in self.engine.generate(*args, **options)]


def loose(run):
    run.engine = Ending(run.engine)
    return run


def finish(settings, **changes):
    list(loose(Revise(ReviseConfig(**{**settings, **changes}))))


def test_the_command_says_that_nothing_could_be_used(settings, capsys):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "max_new_tokens"]
    assert main(["revise", *options, "--max-rejected=1", "--max-new-tokens=2"]) == 1
    assert "no row can be used" in capsys.readouterr().err


def test_principles_are_drawn_by_the_seed_the_round_and_the_row():
    principles = [Principle(name, "c", "r") for name in "abcd"]
    drawn = [draw(principles, seed=1, round_number=1, row=row).name for row in range(400)]
    assert all(70 < count < 130 for count in Counter(drawn).values()) and len(set(drawn)) == 4
    for changes in ({"seed": 2}, {"round_number": 2}):
        key = {"seed": 1, "round_number": 1, **changes}
        assert drawn != [draw(principles, row=row, **key).name for row in range(400)]


def test_the_shipped_principles_are_whole():
    principles = load_principles(None)
    assert len(principles) == 8 and all("your last response" in p.critique for p in principles)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[", "is not YAML"),
        ("name: a", "must be a list of entries with critique, name, revision"),
        ("- {name: a, critique: b}", "entry 1 must have texts critique, name, revision"),
        ("- {name: a, critique: b, revision: ' '}", "entry 1 must have texts"),
        ("- {name: a, critique: b, revision: c}\n" * 2, "has 'a' twice"),
        (" ", "is empty"),
    ],
)
def test_bad_principles_are_named_before_anything_is_written(settings, text, expected):
    Path(settings["principles"]).write_text(text)
    with pytest.raises(ValueError, match=expected):
        Revise(ReviseConfig(**settings))
    assert not Path(settings["output"]).exists()
