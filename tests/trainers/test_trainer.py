"""What all loops share: checkpoints by the clock, leaving early, and going on with more steps or another rate."""

import json
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hooks import after_forward, failing_update
from loops import demonstrations, model_folder
from ppo_runs import config as ppo_config
from ppo_runs import make_folder, share_of_low_tokens

from fastrlhf import PPO
from fastrlhf.models.policy import Policy
from fastrlhf.runtime import checkpoint as checkpoint_module
from fastrlhf.runtime import saved_models
from fastrlhf.runtime.checkpoint import CheckpointClock, newest_checkpoint
from fastrlhf.runtime.jsonl import read_jsonl
from fastrlhf.runtime.optim import learning_rate_at
from fastrlhf.runtime.signals import Interrupted
from fastrlhf.settings.training import SFTConfig
from fastrlhf.trainers import base
from fastrlhf.trainers.sft import SFT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sft(tmp_path):
    """SFT on 24 rows, 5 steps an epoch, the last of them of 4 rows."""
    given = {"model": model_folder(tmp_path / "model"), "data": demonstrations(tmp_path / "data.jsonl")}
    given |= {"template": "none", "batch_size": 5, "device": "cpu", "output": str(tmp_path / "out")}
    return lambda **changes: SFT(SFTConfig(**{**given, **changes}))


@pytest.fixture
def ppo(tmp_path):
    make_folder(tmp_path)
    return lambda **changes: PPO(ppo_config(tmp_path, **changes))


def files(folder):
    """What a run leaves, by name; times differ."""
    found = [folder / "metrics.jsonl", *(folder / "model").iterdir()]
    return {path.relative_to(folder): path.read_bytes() for path in found}


class FakeTime:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.mark.parametrize(("seconds_of_step", "seconds_of_checkpoint"), [(10, 1), (10, 30), (400, 200), (7, 0)])
def test_checkpoints_by_the_clock_come_in_time_and_take_at_most_5_percent(
    monkeypatch, seconds_of_step, seconds_of_checkpoint
):
    time = FakeTime()
    monkeypatch.setattr(checkpoint_module, "time", time)
    clock, at, spent, saved = CheckpointClock(15), [], 0.0, 0.0
    for _ in range(3000):
        time.now += seconds_of_step
        if clock.is_due(lambda: seconds_of_checkpoint * 200_000_000):  # it is written at 200 MB/s
            assert time.now - saved >= 15 * 60
            time.now += seconds_of_checkpoint
            spent += seconds_of_checkpoint
            clock.saved(seconds_of_checkpoint)
            at.append(time.now)
            assert spent <= 0.05 * time.now
            saved = time.now
    gap = max(15 * 60, 20 * seconds_of_checkpoint) + seconds_of_step + seconds_of_checkpoint
    assert all(b - a <= gap for a, b in pairwise(at[1:])) and len(at) > 10
    assert not CheckpointClock(0).is_due(lambda: 0)


def test_checkpoints_are_every_15_minutes_unless_there_are_to_be_none(sft):
    assert [sft(save_every=n, overwrite=True).config.save_minutes for n in (100, 0)] == [15, 0]


def test_checkpoints_by_the_clock_change_nothing_else(sft, tmp_path, monkeypatch):
    sft(output=str(tmp_path / "whole")).run()
    time = FakeTime()
    monkeypatch.setattr(checkpoint_module, "time", time)
    monkeypatch.setattr(base, "time", time)
    steps = []
    with sft(save_every=0, save_minutes=1, keep_checkpoints=9) as loop:
        for _ in loop:
            time.now += 31  # due after every other step
            steps.append(loop.num_steps_done)
    names = sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir())
    assert names == ["step-000003", "step-000005"]
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_whoever_leaves_early_can_save_and_go_on(name, request, tmp_path):
    make = request.getfixturevalue(name)
    make(output=str(tmp_path / "whole")).run()
    with make() as loop:
        for _ in loop:
            if loop.num_steps_done == 2:
                break
        loop.save(tmp_path / "by_hand")
        assert loop.save_checkpoint() == tmp_path / "out/checkpoints/step-000002"
    assert (tmp_path / "by_hand/model.safetensors").exists() and not (tmp_path / "out/model").exists()
    for go_on in (loop.__next__, loop.save_checkpoint):
        with pytest.raises(ValueError, match="is closed: make it anew with resume=True to go on"):
            go_on()
    make(resume=True).run()
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_loop_closes_at_its_end_and_after_an_exception(sft, tmp_path):
    held, loop = tmp_path / "out/.lock", sft()
    assert held.exists() and not loop.is_closed
    assert len(list(loop)) == 5 and list(loop) == []
    assert loop.is_closed and not held.exists()
    with pytest.raises(KeyError), sft(overwrite=True) as loop:
        assert held.exists()
        raise KeyError
    assert loop.is_closed and not held.exists()


def test_a_step_that_was_broken_off_is_no_checkpoint_and_nothing_follows_it(sft, tmp_path):
    loop = sft()
    next(loop)
    loop.save_checkpoint()
    with failing_update(1, ZeroDivisionError()), pytest.raises(ZeroDivisionError):
        next(loop)
    for go_on in (loop.save_checkpoint, loop.__next__):
        with pytest.raises(
            ValueError, match=r"step 2 was broken off half-way.*resume=True to go on from .*step-000001"
        ):
            go_on()
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize("error", [TimeoutError("reward: it hangs"), Interrupted(signal.SIGINT)])
def test_ppo_keeps_the_steps_before_one_whose_reward_fails(ppo, tmp_path, error):
    """Nothing has changed when sampling or scoring fails, so it can be tried again, too."""
    errors = []

    def reward(*args, **columns):
        if errors:
            raise errors[0]
        return share_of_low_tokens(*args, **columns)

    ppo(output=str(tmp_path / "whole"), reward=reward).run()
    loop = ppo(save_every=0, save_minutes=0, reward=reward)
    for _ in range(2):
        next(loop)
    errors.append(error)
    for _ in range(2):
        with pytest.raises(type(error)):
            next(loop)
    loop.close()
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-000002"]
    errors.clear()
    ppo(resume=True, reward=reward).run()
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_step_that_fails_in_its_update_leaves_no_checkpoint(ppo, tmp_path):
    loop = ppo()
    next(loop)
    with failing_update(1, TimeoutError()), pytest.raises(TimeoutError):
        next(loop)
    assert not (tmp_path / "out/checkpoints").exists()


def test_a_stop_iteration_in_a_step_does_not_pass_for_the_end_of_the_loop(sft):
    loop = sft()
    next(loop)
    with (
        failing_update(1, StopIteration()),
        pytest.raises(RuntimeError, match="step 2 was broken off by a StopIteration"),
    ):
        list(loop)


def test_a_loop_whose_folder_another_one_took_writes_no_checkpoint(sft, tmp_path):
    loop = sft()
    next(loop)
    other = sft(overwrite=True)
    with pytest.raises(RuntimeError, match="is no longer held by this run"):
        loop.save_checkpoint()
    assert not (tmp_path / "out/checkpoints").exists()
    next(other)
    assert other.save_checkpoint().is_dir()


def test_more_epochs_are_those_of_a_run_that_had_them_from_the_start(sft, tmp_path):
    """With a constant learning rate, and epochs that end with a whole batch."""
    plan = {"batch_size": 6, "schedule": "constant", "warmup_ratio": 0.0}
    sft(**plan, epochs=2, output=str(tmp_path / "whole")).run()
    sft(**plan).run()
    first = files(tmp_path / "out")
    sft(**plan, epochs=2, resume=True).run()
    assert files(tmp_path / "out") == files(tmp_path / "whole") != first


def test_a_run_that_is_extended_leaves_out_no_row(sft, tmp_path, capsys):
    """Though its last step was smaller than the others; and its schedule is that of all steps."""
    sft(learning_rate=1e-3).run()
    loop, seen = sft(epochs=3, learning_rate=1e-4, resume=True), []

    def note(policy, inputs, output):
        batch = inputs[0]
        seen.extend(tuple(part.tolist()) for part in batch.tokens.split(batch.lengths))

    with after_forward(Policy, note):
        steps = list(loop)
    assert len(loop.rows) == 24 and sorted(seen) == sorted(2 * [tuple(row.tokens) for row in loop.rows])
    said = capsys.readouterr().out
    assert "resume: epochs was 1 and is 3" in said and "resume: learning_rate was 0.001 and is 0.0001" in said
    saved = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert (saved["epochs"], saved["learning_rate"]) == (3, 1e-4)
    plan = {"peak": 1e-4, "num_steps": 15, "num_warmup_steps": 0, "schedule": "cosine"}
    expected = [learning_rate_at(step, **plan) for step in range(5, 15)]
    assert [metrics["learning_rate"] for metrics in steps] == pytest.approx(expected)
    assert [row["step"] for row in read_jsonl(tmp_path / "out/metrics.jsonl")] == list(range(1, 16))


def test_ppo_goes_on_for_more_steps_at_another_rate(ppo, tmp_path):
    ppo(steps=2, kl_coef=0.1, kl_coef_end=0.001).run()
    options = {"learning_rate": 1e-4, "schedule": "constant", "value_learning_rate": 2e-4}
    loop = ppo(steps=4, kl_coef=0.1, kl_coef_end=0.001, resume=True, **options)
    assert loop.num_steps_done == 2
    third, fourth = loop
    assert third["ppo/policy/learning_rate"] == 1e-4
    assert loop.learner.value_optimizer.learning_rate == 2e-4
    # geometric from the first to the last of four steps; the plan of two had come to its end
    assert fourth["objective/kl_coef"] == pytest.approx(0.001)
    assert newest_checkpoint(tmp_path / "out").name == "step-000004"


def test_what_cannot_be_extended_is_refused_by_name(sft, tmp_path):
    sft(epochs=2).run()
    for changes, text in (
        ({"epochs": 1}, "epochs is 1, but more than that is done already"),
        ({"epochs": 2, "learning_rate": 1e-3}, "learning_rate was 1e-05 and is 0.001, but all 10 steps are done"),
        ({"epochs": 3, "weight_decay": 0.1}, "weight_decay was 0.0 and is 0.1; give the same"),
    ):
        with pytest.raises(ValueError, match=f"resume: {text}"):
            sft(**changes, resume=True)
    sft(epochs=1, save_every=0, output=str(tmp_path / "bare")).run()
    with pytest.raises(ValueError, match="has no checkpoint to go on from; start a run in another folder with"):
        sft(epochs=2, save_every=0, output=str(tmp_path / "bare"), resume=True)


def test_fewer_steps_than_planned_end_a_stopped_run(ppo, tmp_path):
    with ppo(steps=5, save_every=1) as loop:
        next(loop), next(loop)
    with pytest.raises(ValueError, match="resume: 1 steps are asked for, but 2 are done"):
        ppo(steps=1, resume=True)
    assert list(ppo(steps=2, resume=True)) == []
    assert (tmp_path / "out/model").is_dir()


def test_a_kill_before_the_model_of_an_extended_run_is_replaced_does_not_leave_the_old_one(sft, tmp_path, monkeypatch):
    plan = {"learning_rate": 1e-2}
    sft(**plan).run()
    old = files(tmp_path / "out")

    class Killed(BaseException):
        pass

    def die(folder, write):
        raise Killed

    with monkeypatch.context() as killed, pytest.raises(Killed):
        killed.setattr(saved_models, "write_whole", die)
        sft(**plan, epochs=2, resume=True).run()
    assert files(tmp_path / "out")[Path("model/model.safetensors")] == old[Path("model/model.safetensors")]
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy/model")  # as after cp -r, which copies in any order
    for name in ("out", "copy"):
        assert list(sft(**plan, epochs=2, resume=True, output=str(tmp_path / name))) == []
        weights, steps = (tmp_path / name / file for file in ("model/model.safetensors", "steps.json"))
        assert weights.read_bytes() != old[Path("model/model.safetensors")]
        assert json.loads(steps.read_text()) == {"planned": 10, "model": 10}
        at = weights.stat().st_mtime_ns
        assert list(sft(**plan, epochs=2, resume=True, output=str(tmp_path / name))) == []
        assert weights.stat().st_mtime_ns == at  # it is there, and not written again


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_the_bytes_of_a_checkpoint_are_about_those_that_are_estimated(kind, request, tmp_path):
    options = {"ppo": {"ema_decay": 0.9, "reference_every": 2}}.get(kind, {})
    loop = request.getfixturevalue(kind)(**options)
    next(loop)
    written = sum(path.stat().st_size for path in loop.save_checkpoint().rglob("*") if path.is_file())
    assert loop.checkpoint_bytes() == pytest.approx(written, rel=0.3)


def test_the_warm_up_of_the_value_model_is_told(ppo, capsys):
    ppo(value_warmup_steps=2).run()
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("steps 1 to 2 train the value model alone; the policy is trained from step 3 on")
    end = lines.index("the value model's warm-up is over: from step 3 on the policy is trained, too")
    rows = [n for n, line in enumerate(lines) if line.strip().startswith(("1/3", "2/3", "3/3"))]
    assert start < rows[0] and rows[1] < end < rows[2]
    ppo(reward=share_of_low_tokens, estimator="rloo", samples_per_prompt=2, overwrite=True).run()
    assert "value model" not in "".join(line for line in capsys.readouterr().out.splitlines() if "step" in line)
