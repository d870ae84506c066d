"""Damaged files of a run and of the models that it reads: it goes on right, or is refused and nothing is changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from commands import GOES_ON, JOBS, READS_MODELS, arguments
from outcomes import Outcome, Trials, judged, spoken
from processes import differences, snapshot, start
from undisturbed import Whole, begin, half_run, restored, whole_run


def _gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _in_place(path: Path, make: Callable[[], object]) -> None:
    _gone(path)
    make()


def _byte(path: Path) -> None:
    data = bytearray(path.read_bytes() or b"x")
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _line(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[: len(lines) // 2], b'{"step": [\n', *lines[len(lines) // 2 :]]))


FAULTS: dict[str, Callable[[Path], object]] = {
    "missing": _gone,
    "a link to nowhere": lambda path: _in_place(path, lambda: path.symlink_to("/proc/no-such-file")),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: 2 * path.stat().st_size // 3]),
    "another byte": _byte,
    "a folder": lambda path: _in_place(path, path.mkdir),
    "unreadable": lambda path: path.chmod(0),
    "a damaged line": _line,
    "zeros at the end": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 64 + b"\n"),
    "another JSON type": lambda path: path.write_text("[3]\n"),
    "nested JSON": lambda path: path.write_text("[" * 5000),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00" + path.read_bytes()),
}
OF_TEXT = ("a damaged line", "zeros at the end", "another JSON type", "nested JSON", "not UTF-8")
OF_MODELS = (
    "missing",
    "a link to nowhere",
    "cut",
    "another byte",
    "a folder",
)  # and of checkpoints
OF_FOLDERS: dict[str, Callable[[Path], object]] = {
    "missing": _gone,
    "a link to nowhere": FAULTS["a link to nowhere"],
    "a file": lambda path: _in_place(path, lambda: path.write_text("x")),
    "empty": lambda path: _in_place(path, path.mkdir),
}


def trials(command: str, folder: Path, number: int) -> Trials:
    """number: of no meaning: each file is damaged in every way; of a job, which is made of loops, in one"""
    out, saved = folder / "out", {name: folder / name for name in ("half", "done")}
    whole = whole_run(command, "new", out)
    restored(out, saved["done"])
    restored(None, out)
    half_run(command, "new", out, whole)
    restored(out, saved["half"])
    for state, before in saved.items():
        for place, path in _read_of(before) if command not in GOES_ON or state == "done" else ():
            faults = _faults_of(place, path)
            if command in JOBS:
                faults = Random(f"{state} {place}").sample(faults, 1)
            for fault in faults:
                yield f"{state} {place} {fault}", partial(_try, command, out, before, place, fault, whole)
        if (before / "checkpoints").is_dir():
            yield f"{state} all checkpoints", partial(_try_all_checkpoints, command, out, before, whole)
    for option in READS_MODELS.get(command, ()):
        for path in sorted(Path(option[1]).rglob("*")):
            for fault in _faults_of(Path(path.name), path):
                name = f"{option[0]} {path.relative_to(option[1])} {fault}"
                yield name, partial(_try_model, command, out, option, path, fault)


def _read_of(saved: Path) -> list[tuple[Path, Path]]:
    """The files and folders of a run: all but those of its older checkpoints, which are read where a newer one is
    damaged, and what a kill left that is deleted unread."""
    newest = {max(folder.glob("step-??????"), default=None) for folder in saved.rglob("checkpoints")}
    found = []
    for path in sorted(saved.rglob("*")):
        place = path.relative_to(saved)
        step = next((each for each in (path, *path.parents) if each.parent.name == "checkpoints"), None)
        if not (step is not None and step not in newest) and ".partial" not in str(place):
            found.append((place, path))
    return found


def _faults_of(place: Path, path: Path) -> list[str]:
    if path.is_dir():
        return list(OF_FOLDERS)
    if {"checkpoints", "model", "best"} & {*place.parts}:
        return list(OF_MODELS)
    is_text = path.suffix in (".json", ".jsonl", ".yaml", ".txt", ".csv", ".md", "") and path.name != ".lock"
    return [name for name in FAULTS if is_text or name not in OF_TEXT]


def _damage(path: Path, fault: str) -> None:
    (OF_FOLDERS if path.is_dir() else FAULTS)[fault](path)


def _try(command: str, out: Path, saved: Path, place: Path, fault: str, whole: Whole, rng: Random) -> Outcome:
    what = f"a file of the run: {fault}" if not (saved / place).is_dir() else f"a folder of the run: {fault}"
    if fault == "unreadable" and os.geteuid() == 0:
        return Outcome(what, "skipped", "root reads everything")
    restored(saved, out)
    _damage(out / place, fault)
    return _go_on(command, out, what, whole, (str(place), place.name))


def _try_all_checkpoints(command: str, out: Path, saved: Path, whole: Whole, rng: Random) -> Outcome:
    restored(saved, out)
    for path in out.glob("checkpoints/step-*/state.pt"):
        _byte(path)
    return _go_on(command, out, "all checkpoints: another byte", whole, ("checkpoint",))


def _go_on(command: str, out: Path, what: str, whole: Whole, names: tuple[str, ...]) -> Outcome:
    before = _kept(out)
    process = begin(command, "new", out, GOES_ON.get(command, "--resume"), name="b")
    process.wait()
    ended, detail = judged(process, out, whole.left)
    if ended == "refused":
        if words := differences(before, _kept(out)):
            ended, detail = "lost", f"{'; '.join(words[:5])} after: {detail}"
        elif not any(name in detail for name in (*names, "--overwrite")):
            ended = "unclear"
    return Outcome(what, ended, detail)


def _kept(out: Path) -> dict[str, str]:
    """What a refused run must leave as it is; what the links are counts too."""
    links = {str(path.relative_to(out)): os.readlink(path) for path in out.rglob("*") if path.is_symlink()}
    return {name: held for name, held in {**snapshot(out), **links}.items() if ".partial" not in name}


def _try_model(command: str, out: Path, option: tuple[str, str], path: Path, fault: str, rng: Random) -> Outcome:
    what = f"a file of a model that is read: {fault}"
    if fault == "unreadable" and os.geteuid() == 0:
        return Outcome(what, "skipped", "root reads everything")
    name, model = option
    copy = out.with_name("model")
    restored(Path(model), copy)
    restored(None, out)
    _damage(copy / path.relative_to(model), fault)
    process = start(arguments(command, "new", name, str(copy)), out, out.with_name("b.log"))
    process.wait()
    ended, detail = spoken(process)
    if ended == "refused" and str(copy) not in detail:
        ended = "unclear"
    return Outcome(what, ended, detail if ended != "read" else "")
