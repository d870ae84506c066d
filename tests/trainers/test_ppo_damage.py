"""A run whose newest checkpoint was damaged goes on from the one before it."""

from pathlib import Path

import pytest
from ppo_runs import config, make_folder

from fastrlhf import PPO

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["state.pt", "policy/model.safetensors", "value_model/config.json"])
def test_a_run_with_a_truncated_checkpoint_repeats_what_was_lost_bit_for_bit(tmp_path, name):
    folder = make_folder(tmp_path)
    changes = {"steps": 5, "save_every": 1}
    list(PPO(config(folder, output=str(folder / "whole"), **changes)))
    killed = PPO(config(folder, **changes))
    for _ in range(4):
        next(killed)
    damaged = folder / "out/checkpoints/step-000004" / name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=rf"step-000004 is damaged \({name} has other contents\)"):
        resumed = PPO(config(folder, resume=True, **changes))
    assert resumed.num_steps_done == 3 and len(list(resumed)) == 2
    assert Path(folder / "out/metrics.jsonl").read_bytes() == Path(folder / "whole/metrics.jsonl").read_bytes()
    assert sorted(path.name for path in (folder / "out/checkpoints").iterdir()) == ["step-000004", "step-000005"]
