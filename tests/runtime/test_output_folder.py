"""The output folder of a run: who may write there, what is kept, what a resumed run notices."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from loops import ROOT

from fastrlhf.errors import DiskFullError
from fastrlhf.runtime import atomic_io as whole
from fastrlhf.runtime.atomic_io import write_file, write_json, write_whole
from fastrlhf.runtime.checkpoint import load_state, restore_lines, save_checkpoint
from fastrlhf.runtime.fingerprints import BLOCK, WHOLE, fingerprint_file
from fastrlhf.runtime.jsonl import read_jsonl, truncate_after_step
from fastrlhf.runtime.lock import FolderInUseError, Lock
from fastrlhf.runtime.output_folder import OutputFolder
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.settings.training import RewardConfig, SFTConfig


def config(tmp_path, **changes):
    return SFTConfig(**{"model": "m", "data": "d", "output": str(tmp_path / "out"), **changes})


def begun(config, *, steps=1):
    """The folder of a run that did some steps."""
    folder = OutputFolder(config)
    folder.open()
    for step in range(1, steps + 1):
        with open(folder.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step}) + "\n")
        save_checkpoint(folder.path, step, lambda path: (path / "weights").write_text("w"))
    folder.close()
    return folder.path


def resumed(config):
    """The checkpoint that the run would go on from."""
    folder = OutputFolder(config)
    folder.close()
    return folder.checkpoint


HOLD = """
    import sys, time
    from pathlib import Path
    from fastrlhf.runtime.lock import Lock
    lock = Lock(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold():
    """Starts processes that hold a folder."""
    processes = []

    def start(folder):
        code, path = textwrap.dedent(HOLD), {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, env=path)
        assert process.stdout.readline() == b"held\n"
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_of_another_process_is_refused_by_its_name_until_that_process_ends(tmp_path, hold, how):
    out = begun(config(tmp_path))
    other = hold(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(FolderInUseError, match=rf"out is in use by process {other.pid} \(-c .*wait until it has ended"):
        OutputFolder(config(tmp_path, **how))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert resumed(config(tmp_path, resume=True)).name == "step-000001"


def test_a_folder_in_which_another_process_holds_a_part_is_not_overwritten(tmp_path, hold):
    out = begun(config(tmp_path))
    hold(out / "model")
    with pytest.raises(FolderInUseError, match="out/model is in use by process"):
        OutputFolder(config(tmp_path, overwrite=True))


def test_a_part_of_a_folder_of_another_process_is_refused(tmp_path, hold):
    """As the folder of a stage, while the job works on another one."""
    (tmp_path / "job").mkdir()
    other = hold(tmp_path / "job")
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(FolderInUseError, match=rf"/job is in use by process {other.pid}"):
            OutputFolder(config(tmp_path, output=str(tmp_path / "job" / "sft"), **how))
    assert [path.name for path in (tmp_path / "job").iterdir()] == [".lock"]


def test_a_file_of_somebody_else_named_as_the_lock_stays(tmp_path):
    out, mine = tmp_path / "out", tmp_path / "mine.txt"
    out.mkdir()
    mine.write_text("precious")
    (out / ".lock").write_text("held by a tool of mine")
    with pytest.raises(FileExistsError, match=r"out/.lock is no lock of ours"):
        OutputFolder(config(tmp_path, overwrite=True))
    assert (out / ".lock").read_text() == "held by a tool of mine"
    (out / ".lock").unlink()
    (out / ".lock").symlink_to(mine)
    with pytest.raises(FileExistsError, match=r"out/.lock is a link"):
        OutputFolder(config(tmp_path))
    assert mine.read_text() == "precious"


def test_a_lock_that_is_deleted_ends_the_run(tmp_path):
    folder = OutputFolder(config(tmp_path))
    folder.open()
    (folder.path / ".lock").unlink()
    with pytest.raises(RuntimeError, match=r"\.lock was deleted while the run went on"):
        folder.check()


def test_a_newer_run_of_the_same_process_takes_the_folder_over(tmp_path):
    first = OutputFolder(config(tmp_path))
    second = OutputFolder(config(tmp_path))
    first.open()
    second.open()
    for use in (first.check, first.open):
        with pytest.raises(RuntimeError, match="no longer held by this run"):
            use()
    first.close()
    second.check()
    second.close()
    with pytest.raises(RuntimeError, match="no longer held by this run"):
        second.check()


def test_a_run_that_is_refused_leaves_the_folder_to_the_one_before_it(tmp_path, hold):
    first = OutputFolder(config(tmp_path))
    first.open()
    write_file(first.path / "metrics.jsonl", LINE_1)
    with pytest.raises(FileExistsError, match="not empty"):
        OutputFolder(config(tmp_path))
    first.check()
    assert (first.path / ".lock").is_file()


def test_a_fork_does_not_keep_the_lock(tmp_path, hold):
    lock = Lock(tmp_path / "out")
    child = os.fork()
    if child == 0:
        try:
            lock.check()
        except RuntimeError:
            signal.pause()
        os._exit(1)  # a fork may not write
    lock.release()
    try:
        assert hold(tmp_path / "out").poll() is None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_nothing_is_left_of_a_start_that_failed(tmp_path):
    folder = OutputFolder(config(tmp_path, output=str(tmp_path / "runs" / "sft" / "1")))
    assert (tmp_path / "runs" / "sft" / "1").is_dir()
    folder.close()
    assert not (tmp_path / "runs").exists()


def test_a_folder_in_which_nothing_was_done_is_free(tmp_path):
    open_config = config(tmp_path, learning_rate=1.0)
    folder = OutputFolder(open_config)
    folder.open()
    (folder.path / "samples.jsonl").write_text("{}\n")  # of a step that failed
    (folder.path / "metrics.jsonl").write_text("")
    (folder.path / "checkpoints" / "step-000001.partial").mkdir(parents=True)
    (folder.path / "checkpoints" / "step-000001.partial" / "state.pt").write_text("half")
    folder.close()
    corrected = OutputFolder(config(tmp_path))
    corrected.open()
    corrected.close()
    assert {path.name for path in folder.path.iterdir()} == {"config.yaml", "inputs.json"}


def test_a_folder_with_a_step_is_refused(tmp_path):
    begun(config(tmp_path))
    ways = r"--resume \(resume=True\) continues it, --overwrite \(overwrite=True\) deletes it, or give another folder"
    with pytest.raises(FileExistsError, match=rf"not empty: it holds a run of fastrlhf sft, .*; {ways}$"):
        OutputFolder(config(tmp_path))


def test_a_refusal_says_how_far_the_run_has_come(tmp_path):
    out = begun(config(tmp_path), steps=3)

    def found(given=config):
        with pytest.raises(FileExistsError) as refused:
            OutputFolder(given(tmp_path))
        return str(refused.value).partition("it holds ")[2]

    assert found().startswith("a run of fastrlhf sft, 3 steps done, not finished; --resume")
    write_json(out / "steps.json", {"planned": 7})
    assert found().startswith("a run of fastrlhf sft, 3 of 7 steps done, not finished; --resume")
    write_json(out / "steps.json", {"planned": 3, "model": 3})
    assert found().startswith("a run of fastrlhf sft, 3 of 3 steps done, not finished"), "its model is not there yet"
    (out / "model").mkdir()
    finished = (
        "a run of fastrlhf sft, 3 of 3 steps done, finished; --resume (resume=True) with a larger --epochs extends"
    )
    assert found().startswith(finished)

    def of_reward(tmp_path):
        return RewardConfig(model="m", data="d", output=str(tmp_path / "out"))

    assert found(of_reward).startswith("a run of fastrlhf sft, 3 of 3 steps done, finished; --overwrite"), "no --resume"
    (out / "metrics.jsonl").write_bytes(b'{"step": 1}\n[]\n{"step')  # half written
    (out / "steps.json").write_text("[")
    assert found().startswith("a run of fastrlhf sft, 1 step done, not finished")


COMMON = ["config.yaml", "model", "timing.jsonl", "data/train.jsonl", "tensorboard/events", "model/config.yaml"]


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("name", COMMON)
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, how, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("learning_rate: 1\n")
    with pytest.raises(FileExistsError, match="holds no fastrlhf run" if how else "is not empty"):
        OutputFolder(config(tmp_path, **how), cheap=("data",))
    if not how:
        with pytest.raises(FileExistsError, match=r"it holds no fastrlhf run .*; give another folder$"):
            OutputFolder(config(tmp_path), cheap=("data",))
    assert path.read_text() == "learning_rate: 1\n"


def test_a_folder_with_the_score_of_the_start_alone_is_free(tmp_path):
    folder = OutputFolder(config(tmp_path))
    folder.open()
    write_file(folder.path / "metrics.jsonl", b'{"step": 0, "eval/score": 1.0}\n')
    folder.close()
    OutputFolder(config(tmp_path)).close()
    write_whole(folder.path / "best", lambda path: (path / "weights").write_text("w"))
    OutputFolder(config(tmp_path)).close()
    (folder.path / "metrics.jsonl").unlink()  # somebody keeps the model alone
    with pytest.raises(FileExistsError, match="not empty"):
        OutputFolder(config(tmp_path))


def test_a_run_of_another_command_is_not_resumed_or_mixed_with(tmp_path):
    out = begun(config(tmp_path))
    settings = {"model": "m", "data": "d", "output": str(out)}
    with pytest.raises(FileExistsError, match=r"a run of another kind \(SFTConfig, not RewardConfig\)"):
        OutputFolder(RewardConfig(**settings, resume=True))
    with pytest.raises(FileExistsError, match=r"a run of another kind \(SFTConfig, not RewardConfig\)"):
        OutputFolder(RewardConfig(**settings, overwrite=True), ours=("config.yaml", "verdicts.jsonl"))
    assert OutputFolder(RewardConfig(**settings, overwrite=True)).checkpoint is None  # it writes, so deletes, the same


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(tmp_path):
    out = begun(config(tmp_path))
    (out / "notes.txt").write_text("mine")
    folder = OutputFolder(config(tmp_path, overwrite=True))
    assert (out / "checkpoints").exists()  # until all is loaded
    folder.open()
    folder.close()
    assert {path.name for path in out.iterdir()} == {"config.yaml", "inputs.json", "notes.txt"}


@pytest.mark.parametrize("option", ["model", "data", "eval_data"])
def test_overwrite_never_deletes_what_the_run_reads(tmp_path, option):
    out = begun(config(tmp_path))
    (out / "model").mkdir()
    link = tmp_path / "link"
    link.symlink_to(out / "model")
    for path in (out / "model", link, out / "checkpoints" / "step-000001"):
        with pytest.raises(ValueError, match=rf"{option} reads .*/out/.*, which lies in .*out and would be deleted"):
            OutputFolder(config(tmp_path, overwrite=True, **{option: str(path)}))
    reward = f"my:f=0.5,clip({out / 'model'};-1;1)=2"
    with pytest.raises(ValueError, match=r"reward reads .*out/model, which lies in"):
        OutputFolder(PPOConfig(model="m", data="d", reward=reward, output=str(out), overwrite=True))


def test_overwrite_never_deletes_what_a_glob_or_an_adapter_reads(tmp_path):
    out = begun(config(tmp_path))
    (out / "samples.jsonl").write_text('{"prompt": "a"}\n')
    for data in (f"{out}/sam*.jsonl", str(out)):
        with pytest.raises(ValueError, match=r"data reads .*, which lies in .*out and would be deleted"):
            OutputFolder(config(tmp_path, overwrite=True, data=data))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(out / "model")}))
    (out / "model").mkdir()
    with pytest.raises(ValueError, match=r"model reads .*out/model, which lies in"):
        OutputFolder(config(tmp_path, overwrite=True, model=str(adapter)))


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(FileExistsError, match="is a file, expected a folder"):
        OutputFolder(config(tmp_path, overwrite=True))


def test_resume_names_the_setting_that_differs(tmp_path):
    begun(config(tmp_path, batch_size=8))
    with pytest.raises(ValueError, match="resume: batch_size was 8 and is 32"):
        OutputFolder(config(tmp_path, resume=True))
    same = config(tmp_path, batch_size=8, resume=True, max_tokens=7, save_every=3, gradient_checkpointing=True)
    assert resumed(same).name == "step-000001"  # these change how it runs, not what it computes


def test_resume_names_all_that_differs_at_once(tmp_path):
    model, data = model_in(tmp_path / "base"), tmp_path / "data.jsonl"
    data.write_text("{}")
    given = {"model": model, "data": str(data)}
    begun(config(tmp_path, **given, batch_size=8, weight_decay=0.1))
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "base" / file).write_text("other")
    data.write_text('{"a": 1}')
    with pytest.raises(ValueError) as refused:
        OutputFolder(config(tmp_path, **given, batch_size=4, seed=3, weight_decay=0.1, resume=True))
    reasons, _, ways = str(refused.value).partition(" have changed since the run began; ")
    assert ways == f"give those of {tmp_path / 'out/config.yaml'} and restore them, or --overwrite to start anew"
    settings, _, files = reasons.partition("; data: ")
    assert set(settings.removeprefix("resume: ").split("; ")) == {"seed was 0 and is 3", "batch_size was 8 and is 4"}
    assert files == f"{data}, model: {model} (config.json, model.safetensors)"


def test_a_setting_that_names_another_file_is_one_difference(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    begun(config(tmp_path, data=str(tmp_path / "a")))
    with pytest.raises(ValueError) as refused:
        OutputFolder(config(tmp_path, data=str(tmp_path / "b"), resume=True))
    before, after = (str(tmp_path / name) for name in ("a", "b"))
    text = f"resume: data was {before!r} and is {after!r}; give the same, or --overwrite to start anew"
    assert str(refused.value) == text


def test_a_resumed_run_may_read_prompts_otherwise(tmp_path):
    settings = {"model": "model", "data": "data", "output": str(tmp_path / "out")}
    begun(RewardConfig(**settings))
    assert resumed(RewardConfig(**settings, share_prompts=False, resume=True)).name == "step-000001"


def test_resume_without_a_run_starts_afresh(tmp_path):
    folder = OutputFolder(config(tmp_path, resume=True))
    assert folder.checkpoint is None
    assert not folder.is_resumed


def model_in(folder, weights=b"weights"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return str(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "chat_template.jinja"])
def test_a_resumed_run_notices_another_model(tmp_path, file):
    model = model_in(tmp_path / "base")
    begun(config(tmp_path, model=model))
    assert resumed(config(tmp_path, model=model, resume=True)) is not None
    (tmp_path / "base" / file).write_text("other")
    with pytest.raises(
        ValueError, match=rf"resume: model: .*base \({file}\) has changed since the run began; restore it"
    ):
        OutputFolder(config(tmp_path, model=model, resume=True))
    (tmp_path / "base" / "notes.md").write_text("no part of a model")


def test_a_resumed_run_notices_other_rows_and_reward_models(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "answer": 1}\n')
    reward = f"standard({model_in(tmp_path / 'rm')};0.5;2)=0.5,{tmp_path / 'other'}#clear"
    model_in(tmp_path / "other")
    options = {"model": "m", "reward": reward, "data": str(data), "output": str(tmp_path / "out")}
    begun(PPOConfig(**options))
    model_in(tmp_path / "other", b"weighty")
    with pytest.raises(ValueError, match=r"resume: reward: .*other \(model.safetensors\) has changed"):
        OutputFolder(PPOConfig(**options, resume=True))
    model_in(tmp_path / "other")
    data.write_text('{"prompt": "a", "answer": 2}\n')
    with pytest.raises(ValueError, match=r"resume: data: .*d.jsonl has changed"):
        OutputFolder(PPOConfig(**options, resume=True))


def test_the_changed_source_of_a_function_warns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("paid.py").write_text("def f(prompts, responses): return [0.0] * len(prompts)\n")
    options = {"model": "m", "reward": "paid:f", "data": "d", "output": str(tmp_path / "out")}
    begun(PPOConfig(**options))
    assert resumed(PPOConfig(**options, resume=True)) is not None
    Path("paid.py").write_text("def f(prompts, responses): return [1.0] * len(prompts)\n")
    with pytest.warns(UserWarning, match=r"the source of paid:f \(reward\) has changed since the run began"):
        OutputFolder(PPOConfig(**options, resume=True))


def test_files_that_are_no_part_of_a_model_may_come_and_go(tmp_path):
    model = model_in(tmp_path / "base")
    begun(config(tmp_path, model=model))
    (tmp_path / "base" / "notes.txt").write_text("of mine")
    assert resumed(config(tmp_path, model=model, resume=True)) is not None


@pytest.mark.parametrize("data", ["d/*/train.jsonl", "d/**/train.jsonl", "d/a"])
def test_every_file_of_a_glob_or_folder_is_compared(tmp_path, data):
    for name in ("a", "b/c"):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "train.jsonl").write_text('{"prompt": "a", "answer": 1}\n')
    options = {"data": str(tmp_path / data)}
    begun(config(tmp_path, **options))
    (tmp_path / "d/a/train.jsonl").write_text('{"prompt": "a", "answer": 2}\n')
    with pytest.raises(ValueError, match=r"resume: data: .* has changed since the run began"):
        OutputFolder(config(tmp_path, **options, resume=True))


@pytest.mark.parametrize("text", ['{"mo', "[]", None])
def test_damaged_fingerprints_are_those_of_the_checkpoint(tmp_path, text):
    model = model_in(tmp_path / "base")
    out = begun(config(tmp_path, model=model))
    (out / "inputs.json").write_text(text or "")
    if text is None:
        (out / "inputs.json").unlink()
    model_in(tmp_path / "base", b"other")
    with pytest.raises(ValueError, match=r"resume: model: .*base \(model.safetensors\) has changed"):
        OutputFolder(config(tmp_path, model=model, resume=True))


@pytest.mark.parametrize("place", ["start", "end", "second tensor", "size"])
def test_a_large_file_is_known_by_blocks_of_it(tmp_path, place):
    path, second = tmp_path / "model.safetensors", 3 * WHOLE // 2 + 1
    header = json.dumps({"a": {"data_offsets": [0, second]}, "b": {"data_offsets": [second, 2 * WHOLE]}}).encode()
    begin = 8 + len(header)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2 * WHOLE))
    before, size = fingerprint_file(path), path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(
            {"start": begin + 1, "end": size - 1, "second tensor": begin + second + BLOCK - 1, "size": size}[place]
        )
        file.write(b"x")
    assert fingerprint_file(path) != before


def test_folders_that_moved_together_go_on(tmp_path):
    here = tmp_path / "here"
    model = model_in(here / "sft" / "model")
    begun(config(tmp_path, model=model, output=str(here / "ppo")))
    shutil.move(here, tmp_path / "there")
    moved = config(tmp_path, model=str(tmp_path / "there/sft/model"), output=str(tmp_path / "there/ppo"), resume=True)
    assert resumed(moved).name == "step-000001"
    elsewhere = shutil.move(tmp_path / "there/sft/model", tmp_path / "elsewhere")
    alone = config(tmp_path, model=str(elsewhere), output=str(tmp_path / "there/ppo"), resume=True)
    assert resumed(alone).name == "step-000001"  # the same model, by what it holds
    other = config(tmp_path, model=model_in(tmp_path / "m", b"o"), output=str(tmp_path / "there/ppo"), resume=True)
    with pytest.raises(ValueError, match="resume: model was "):
        OutputFolder(other)


def damaged_settings(path):
    return {
        "missing": path.unlink,
        "empty": lambda: path.write_text(""),
        "cut": lambda: path.write_text("# settings of a fastrlhf run\nbatch_size: [8"),
        "no mapping": lambda: path.write_text("# settings of a fastrlhf run\n- 8\n"),
        "no text": lambda: path.write_bytes(b"# settings of a fastrlhf run\nmodel: \xff\n"),
        "code": lambda: path.write_text("# settings of a fastrlhf run\nmodel: !!python/name:os.system\n"),
    }


@pytest.mark.parametrize("damage", list(damaged_settings(Path())))
def test_damaged_settings_are_those_of_the_newest_checkpoint(tmp_path, damage):
    out = begun(config(tmp_path, batch_size=8))
    damaged_settings(out / "config.yaml")[damage]()
    with pytest.warns(
        UserWarning, match=r"config.yaml is damaged or missing; that of .*step-000001/config.yaml is taken"
    ):
        assert resumed(config(tmp_path, batch_size=8, resume=True)).name == "step-000001"
    with (
        pytest.raises(ValueError, match="batch_size was 8 and is 32"),
        pytest.warns(UserWarning, match="damaged or missing"),
    ):
        OutputFolder(config(tmp_path, resume=True))


def test_damaged_settings_without_a_checkpoint_are_named(tmp_path):
    out = begun(config(tmp_path), steps=0)
    (out / "model").mkdir()
    (out / "model" / "weights").write_text("w")
    (out / "config.yaml").write_text("# settings of a fastrlhf run\na: [")
    with pytest.raises(
        ValueError, match=r"config.yaml is damaged or missing, and no checkpoint has a copy; --overwrite"
    ):
        OutputFolder(config(tmp_path, resume=True))


LINE_1, LINE_2 = b'{"step": 1}\n', b'{"step": 2}\n'


@pytest.mark.parametrize("lines", [None, b"", LINE_1, LINE_2, b"garbage\n" + LINE_2, LINE_1 + b'{"st', b"\0" * 64])
def test_damaged_metrics_are_those_of_the_checkpoint(tmp_path, lines):
    out = begun(config(tmp_path), steps=2)
    (out / "metrics.jsonl").write_bytes(lines or b"")
    if lines is None:
        (out / "metrics.jsonl").unlink()
    with pytest.warns(
        UserWarning, match=r"metrics.jsonl lacks lines, or they are damaged; those up to step-000002 are"
    ):
        restore_lines(out / "checkpoints" / "step-000002")
    assert (out / "metrics.jsonl").read_bytes() == LINE_1 + LINE_2


@pytest.mark.parametrize("later", [b"", b'{"step": 3}\n', b'{"st'])
def test_metrics_after_the_checkpoint_are_cut_off(tmp_path, later):
    out = begun(config(tmp_path), steps=2)
    (out / "metrics.jsonl").write_bytes(LINE_1 + LINE_2 + later)
    restore_lines(out / "checkpoints" / "step-000002")
    truncate_after_step(out / "metrics.jsonl", 2)
    assert (out / "metrics.jsonl").read_bytes() == LINE_1 + LINE_2


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "timing.jsonl"
    path.write_bytes(LINE_1 + b"[1]\n" + LINE_2)
    with pytest.raises(ValueError, match=r"timing.jsonl, line 2: damaged"):
        read_jsonl(path)
    with pytest.warns(UserWarning, match=r"timing.jsonl, line 2: damaged, so it and the lines after it are left out"):
        truncate_after_step(path, 9)
    assert path.read_bytes() == LINE_1


@pytest.mark.parametrize("text", ["[]", "null", "3", "[" * 100_000])
def test_checksums_of_another_type_are_damage(tmp_path, text):
    out = begun(config(tmp_path), steps=2)
    (out / "checkpoints" / "step-000002" / "checksums.json").write_text(text)
    with pytest.warns(UserWarning, match=r"step-000002 is damaged \(no readable checksums.json\)"):
        assert resumed(config(tmp_path, resume=True)).name == "step-000001"


def test_a_checkpoint_that_was_renamed_is_refused(tmp_path):
    out = begun(config(tmp_path))
    renamed = (out / "checkpoints" / "step-000001").rename(out / "checkpoints" / "step-000007")
    with pytest.raises(ValueError, match="step-000007 holds the checkpoint of step 1"):
        load_state(renamed)


def test_stray_files_do_not_stand_in_the_way(tmp_path):
    out = begun(config(tmp_path))
    for name in ("checkpoints/x", "checkpoints/step-000002", "model"):
        (out / f"{name}.partial").write_text("stray")
    (out / "checkpoints" / "step-000002").write_text("stray")
    (out / "config.yaml.partial").mkdir()
    folder = OutputFolder(config(tmp_path, resume=True))
    folder.open()
    folder.close()
    assert folder.checkpoint.name == "step-000001"
    save_checkpoint(out, 2, lambda path: None)
    write_whole(out / "model", lambda path: (path / "weights").write_text("w"))
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-000001", "step-000002"}
    assert [path.name for path in (out / "model").iterdir()] == ["weights"]


def test_links_are_followed_or_replaced_and_never_emptied(tmp_path):
    out, elsewhere = begun(config(tmp_path)), tmp_path / "elsewhere"
    for name in ("checkpoints", "precious", "empty"):
        (elsewhere / name).mkdir(parents=True)
    (elsewhere / "precious" / "weights").write_text("of another model")
    shutil.rmtree(out / "checkpoints")
    for name, target in {"checkpoints": "checkpoints", "model": "precious", "best": "empty"}.items():
        (out / name).symlink_to(elsewhere / target)
    save_checkpoint(out, 1, lambda path: None)
    for name in ("model", "best"):
        write_whole(out / name, lambda path: (path / "weights").write_text("new"))
        assert (out / name / "weights").read_text() == "new"
    assert (elsewhere / "empty" / "weights").read_text() == "new"
    assert [path.name for path in (elsewhere / "checkpoints").iterdir()] == ["step-000001"]
    folder = OutputFolder(config(tmp_path, overwrite=True))
    folder.open()
    assert not list((elsewhere / "checkpoints").iterdir())
    assert (elsewhere / "precious" / "weights").read_text() == "of another model"


def full(path):
    Path(path, "half").write_text("")
    raise OSError(28, "No space left on device")


def torch_full(path):
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


@pytest.mark.parametrize("write", [full, torch_full])
def test_a_full_disk_is_named_and_nothing_half_is_left(tmp_path, monkeypatch, write):
    monkeypatch.setattr(whole, "_room", lambda folder: (0.0, 2.0**30))
    with pytest.raises(DiskFullError, match=r"no space left for .*model: 0.0 of 1,024.0 MiB of its disk are free"):
        write_whole(tmp_path / "model", write)
    with pytest.raises(DiskFullError, match=r"no space left for .*table.json"):
        write_file(tmp_path / "table.json", (bytes(1 // n) for n in (1, 0)))  # an error in making the data
    assert not list(tmp_path.iterdir())


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
        write_whole(tmp_path / "model", torch_full)
    assert not list(tmp_path.iterdir())
