import contextlib
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrlhf.runtime import checkpoint
from fastrlhf.runtime.atomic_io import write_whole
from fastrlhf.runtime.checkpoint import load_state, newest_checkpoint, save_checkpoint
from fastrlhf.runtime.fingerprints import fingerprint_tokens
from fastrlhf.runtime.output_folder import OutputFolder
from fastrlhf.settings.training import SFTConfig


def config(tmp_path, **changes):
    return SFTConfig(model="m", data="d", output=str(tmp_path / "out"), **changes)


def check_output(config):
    """The checkpoint that a run would go on from."""
    folder = OutputFolder(config)
    folder.close()
    return folder.checkpoint


def open_output(config):
    folder = OutputFolder(config)
    folder.open()
    folder.close()


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    def write(folder):
        (folder / "weights").touch(mode=0o600)

    write_whole(tmp_path / "model", write)
    (tmp_path / "plain").touch()
    assert (tmp_path / "model" / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_newest_complete_checkpoints_are_kept(tmp_path):
    for step in (9, 10, 999999, 1000000):
        save_checkpoint(tmp_path, step, lambda folder: (folder / "weights").write_text("w"))
    (tmp_path / "checkpoints" / "step-2000000.partial").mkdir()  # killed while writing
    assert newest_checkpoint(tmp_path).name == "step-1000000"
    save_checkpoint(tmp_path, 1000001, lambda folder: None)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-1000000", "step-1000001"}
    save_checkpoint(tmp_path, 1000002, lambda folder: None, keep=3)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: truncate(folder / "state.pt"), "state.pt has other contents"),
        (lambda folder: flip_a_bit(folder / "more/weights"), "more/weights has other contents"),
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / "new").touch(), "new was added"),
        (lambda folder: (folder / "checksums.json").unlink(), "no readable checksums.json"),
        (lambda folder: truncate(folder / "checksums.json"), "no readable checksums.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, damage, words):
    open_output(config(tmp_path))
    first, second = (save_checkpoint(tmp_path / "out", step, write_two) for step in (1, 2))
    resumed = config(tmp_path, resume=True)
    assert check_output(resumed) == second
    damage(second)
    with pytest.warns(UserWarning, match=rf"step-000002 is damaged \({words}\)"):
        assert check_output(resumed) == first
    damage(first)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"), pytest.warns(UserWarning, match="damaged"):
        check_output(resumed)


def test_a_checkpoint_that_fails_half_way_leaves_the_last_one(tmp_path):
    save_checkpoint(tmp_path, 1, lambda folder: None)

    def full(folder):
        (folder / "half").write_text("")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, 2, full)
    assert newest_checkpoint(tmp_path).name == "step-000001"


def test_a_folder_is_replaced_whole(tmp_path):
    write_whole(tmp_path / "model", lambda folder: (folder / "old").write_text(""))
    write_whole(tmp_path / "model", lambda folder: (folder / "new").write_text(""))
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "new"]


class Killed(BaseException):
    """What the process would not live to see."""


@pytest.fixture
def kill_at(monkeypatch):
    """kill_at(n): dies instead of renaming, replacing or deleting for the nth time; a folder is then half deleted."""
    real = {name: getattr(os, name) for name in ("rename", "replace", "unlink")}
    rmtree, left = shutil.rmtree, [0]

    def counted(name):
        def operation(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return real[name](*arguments, **options)

        return operation

    def half(folder, **options):
        left[0] -= 1
        if left[0] == 0:
            for path in sorted(p for p in folder.rglob("*") if p.is_file())[:1]:
                real["unlink"](path)
            raise Killed
        with monkeypatch.context() as whole:
            whole.setattr(os, "unlink", real["unlink"])
            rmtree(folder, **options)

    for name in real:
        monkeypatch.setattr(os, name, counted(name))
    monkeypatch.setattr(shutil, "rmtree", half)
    return lambda n: left.__setitem__(0, n)


def write_two(folder):
    (folder / "weights").write_text("w")
    (folder / "more").mkdir()
    (folder / "more" / "weights").write_text("w")


def is_whole(folder):
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return found == {"checksums.json", "config.yaml", "inputs.json", "more", "more/weights", "state.pt", "weights"}


@pytest.mark.parametrize("moment", range(1, 16))
def test_a_kill_while_a_run_is_overwritten_leaves_a_folder_that_can_be_used(tmp_path, kill_at, moment):
    open_output(config(tmp_path))
    out = tmp_path / "out"
    for step in (1, 2):
        save_checkpoint(out, step, write_two)
    write_whole(out / "model", write_two)
    for name in ("metrics.jsonl", "timing.jsonl"):
        (out / name).write_text("")
    kill_at(moment)
    with contextlib.suppress(Killed):
        open_output(config(tmp_path, overwrite=True))
    kill_at(0)
    newest = check_output(config(tmp_path, resume=True))
    left = {path.name for path in out.iterdir()} & {"checkpoints", "model", "metrics.jsonl", "timing.jsonl"}
    assert len(left) in (0, 4)  # all of the earlier run, or nothing of it
    assert is_whole(newest) if left else newest is None
    open_output(config(tmp_path, overwrite=True))
    assert {path.name for path in out.iterdir()} == {"config.yaml", "inputs.json"}


@pytest.mark.parametrize("moment", range(1, 9))
def test_a_kill_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path, kill_at, moment):
    open_output(config(tmp_path))
    out = tmp_path / "out"
    for step in (1, 2):
        save_checkpoint(out, step, write_two)
    kill_at(moment)
    with contextlib.suppress(Killed):
        save_checkpoint(out, 3, write_two)
    kill_at(0)
    newest = check_output(config(tmp_path, resume=True))
    assert newest.name in ("step-000002", "step-000003")
    assert is_whole(newest)
    assert is_whole(save_checkpoint(out, 3, write_two))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("moment", range(1, 9))
def test_a_kill_while_a_checkpoint_is_written_again_leaves_one_of_both(tmp_path, kill_at, moment):
    open_output(config(tmp_path))
    save_checkpoint(tmp_path / "out", 1, write_two, keep=1)
    kill_at(moment)
    with contextlib.suppress(Killed):
        save_checkpoint(tmp_path / "out", 1, write_two, keep=1)
    kill_at(0)
    assert is_whole(check_output(config(tmp_path, resume=True)))


@pytest.mark.parametrize("moment", range(1, 7))
def test_a_kill_while_a_folder_is_replaced_does_not_stand_in_the_way(tmp_path, kill_at, moment):
    write_whole(tmp_path / "model", write_two)
    kill_at(moment)
    with contextlib.suppress(Killed):
        write_whole(tmp_path / "model", lambda folder: (folder / "new").write_text(""))
    kill_at(0)
    write_whole(tmp_path / "model", lambda folder: (folder / "new").write_text(""))
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which file a descriptor is")
def test_everything_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A power failure must not leave the name of a checkpoint or a file with nothing behind it."""
    events, fsync, rename, replace = [], os.fsync, os.rename, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename {Path(b).name}"), rename(a, b))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"replace {Path(b).name}"), replace(a, b))[1])
    open_output(config(tmp_path))
    out = tmp_path / "out"
    names = ("config.yaml", "inputs.json")
    assert events == [event for name in names for event in (out / f"{name}.partial", f"replace {name}", out)]
    (out / "metrics.jsonl").write_text("")
    events.clear()
    save_checkpoint(out, 1, write_two)
    renamed = events.index("rename step-000001")
    partial = out / "checkpoints" / "step-000001.partial"
    names = (
        "weights",
        "more",
        "more/weights",
        "state.pt",
        "config.yaml",
        "inputs.json",
        "metrics.jsonl",
        "checksums.json",
    )
    assert {*events[:renamed]} == {out / "metrics.jsonl", partial, *(partial / name for name in names)}
    assert events[renamed + 1 :] == [out / "checkpoints", out]


def test_state_and_all_random_numbers_come_back(tmp_path):
    folder = save_checkpoint(tmp_path, 3, lambda folder: None, moments=torch.arange(3), kl_coef=0.1 + 0.2)
    drawn = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(9)
    np.random.seed(9)
    random.seed(9)
    state = load_state(folder)
    assert (state["step"], state["kl_coef"], state["moments"].tolist()) == (3, 0.1 + 0.2, [0, 1, 2])
    assert torch.equal(torch.rand(3), drawn[0])
    assert np.array_equal(np.random.rand(3), drawn[1])
    assert random.random() == drawn[2]


def test_another_machine_warns(tmp_path, monkeypatch):
    folder = save_checkpoint(tmp_path, 1, lambda folder: None)
    there = checkpoint.environment() | {"threads": 64}
    monkeypatch.setattr(checkpoint, "environment", lambda: there)
    with pytest.warns(UserWarning, match=rf"threads was {torch.get_num_threads()} and is 64; .* not bit for bit"):
        load_state(folder)


def test_fingerprint_sees_tokens_and_boundaries():
    assert fingerprint_tokens([[1, 2], [3]]) == fingerprint_tokens([[1, 2], [3]])
    assert len({fingerprint_tokens(x) for x in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[1, 2], [4]])}) == 4
