"""TRL 1.16's trainers with our ops under PEFT, FSDP2 and `accelerate launch`, against the same unpatched."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("trl") is None:
    pytest.skip("TRL is not installed", allow_module_level=True)
from tests.peers.trainers import NEAR, farthest, in_process

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
if not importlib.util.find_spec("trl.kernels"):
    pytest.skip("these need TRL 1.16", allow_module_level=True)


def two_processes(launcher, task, **environment):
    path = os.pathsep.join(map(str, (environment.pop("PYTHONPATH", HERE), HERE, ROOT, *sys.path[1:])))
    command = [sys.executable, "-m", *launcher, str(HERE / "parallel.py"), task]
    here = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        **environment,
        "PYTHONPATH": path,
    }
    done = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"'))), done.stderr


def test_parameters_sharded_by_fsdp2_get_the_gradients_of_trl():
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    found, _ = two_processes(launcher, "sharded")
    for form in ("whole", "in parts"):
        assert found[form]["served"] == 1  # TRL gathers the weight, so ours gets plain tensors
        assert found[form]["patched"] == pytest.approx(found[form]["plain"], rel=1e-5)
    # a weight that nobody gathered goes to the original, whatever that makes of it
    assert found["DTensor"]["patched"] == found["DTensor"]["plain"]


@pytest.mark.slow
def test_accelerate_launch_patches_every_process_and_keeps_the_losses():
    # what --multi_gpu means is several processes on one machine; --cpu would ask for MPI
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no")
    plain, _ = two_processes(launcher, "trained")
    patched, said = two_processes(
        launcher, "trained", FASTRLHF_PATCH="trl", PYTHONPATH=ROOT / "fastrlhf/integrations/startup"
    )
    assert plain["patched"] == [False, False] and patched["patched"] == [True, True]
    assert said.count("fastrlhf.patch('trl')") == 2
    assert len(plain["losses"]) == 2 and farthest(plain["losses"], patched["losses"]) <= NEAR


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SFT", "GRPO"])
def test_adapters_of_peft_train_the_same(name):
    pytest.importorskip("peft", reason="PEFT is not installed")
    plain, patched = (in_process(name, kind, 3, lora=True) for kind in ("plain", "patched"))
    assert len(plain["losses"]) == 3
    for curve in ("losses", "grad_norms"):
        assert farthest(plain[curve], patched[curve]) <= NEAR
    assert any(patched["calls"].values())
