"""What a trainer tells when it is asked changes nothing in the run."""

import json

import pytest
from objects import DATA, TRAINERS, as_paths, files_of, make_places

from fastrlhf import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("inspection"))


@pytest.mark.parametrize("name", ["sft", "reward", "kto", "ppo"])
def test_a_run_that_is_asked_at_every_step_is_the_run_that_is_not(places, tmp_path, name):
    trainer, config, options = TRAINERS[name]
    paths = as_paths(places, {"model": "model", "data": DATA[name], **options})
    trainer(config(**paths, output=str(tmp_path / "alone"))).run()
    asked = trainer(config(**paths, output=str(tmp_path / "asked")))
    values, yielded = [asked.evaluate()], []
    for metrics in asked:
        yielded.append(metrics)
        values.append(asked.evaluate())
    assert files_of(tmp_path / "asked") == files_of(tmp_path / "alone")
    for file in ("steps.json", "best/model.safetensors"):
        if (tmp_path / "alone" / file).exists():
            assert (tmp_path / "asked" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    rows = asked.read_metrics()
    assert [row for row in rows if row.pop("step")] == json.loads(json.dumps(yielded))
    assert [value for row in rows for value in row if value.startswith("eval/")]
    last = next(key for key in values[-1] if key in ("eval/loss", "eval/score"))
    expected = pytest.approx(yielded[-1][last], rel=1e-6)  # the last step of a reward model shifts all scores
    assert values[-1][last] == expected != values[0][last]
    assert asked.evaluate()[last] == expected  # after it is closed, too


def test_samples_are_read_of_all_steps_or_of_one(places, tmp_path):
    trainer, config, options = TRAINERS["ppo"]
    paths = as_paths(places, {"model": "model", "data": "prompts", **options, "samples_every": 1})
    with trainer(config(**paths, output=str(tmp_path))) as ppo:
        assert ppo.read_samples() == [] and ppo.read_metrics() == []
        list(ppo)
    rows = ppo.read_samples()
    assert {row["step"] for row in rows} == {1, 2} and len(rows) == 8
    assert ppo.read_samples(step=2) == [row for row in rows if row["step"] == 2] != []
    assert {*rows[0]} == {"step", "prompt", "response", "finished", "score", "kl"}


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_without_held_out_data_there_is_nothing_to_evaluate_on(places, tmp_path, name):
    trainer, config, options = TRAINERS[name]
    kept = {key: value for key, value in options.items() if not key.startswith("eval_")}
    paths = as_paths(places, {"model": "model", "data": DATA[name], **kept})
    with (
        trainer(config(**paths, output=str(tmp_path))) as made,
        pytest.raises(UserError, match="there is no held-out data: set eval_data"),
    ):
        made.evaluate()
