"""Our replacements against verl's originals: outputs, dtypes and gradients, in and out of what our ops cover."""

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import fastrlhf
from fastrlhf.integrations import PEERS
from fastrlhf.integrations._replacing import _find, same
from fastrlhf.integrations.verl_losses import Settings

pytest.importorskip("verl", reason="verl is not installed")
CORE = "verl.trainer.ppo.core_algos"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def imported():
    """verl's modules, imported here since what they warn of is no failure of these tests."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(CORE)
        importlib.import_module("verl.utils.experimental.torch_functional")


@pytest.fixture(scope="module")
def pairs(imported):
    """name -> (verl's, ours), for those that are replaced in this version."""
    originals = {replacement.path: _find(replacement.path) for replacement in PEERS["verl"]}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("warnings.warn", lambda *_, **__: None)
        with fastrlhf.patch("verl") as done:
            assert len(done.replaced) >= len(originals) - 1, done
            found = {path: (originals[path], _find(path)) for path in done.replaced}
            offered = importlib.import_module(CORE).POLICY_LOSS_REGISTRY["fastrlhf_ppo"]
    assert all(_find(path) is original for path, original in originals.items())
    assert "fastrlhf_ppo" not in importlib.import_module(CORE).POLICY_LOSS_REGISTRY
    found = {path.split(":")[1]: pair for path, pair in found.items()}
    return found | {"compute_policy_loss_vanilla": (found["compute_policy_loss_vanilla"][0], offered)}


def padded(rows, length):
    """Rewards, values and a mask with random gaps, an empty row among them."""
    mask = (torch.rand(rows, length) < 0.7).long()
    mask[0] = 0
    mask[-1, :2] = 1
    return torch.randn(rows, length), torch.randn(rows, length), mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 7), (5, 1000), (2, 9, 4099)])
def test_log_probs_and_entropies_are_verls(pairs, shape, dtype):
    logits = (4 * torch.randn(shape)).to(dtype).requires_grad_()
    labels = torch.randint(shape[-1], shape[:-1])
    for in_place in (True, False):
        same(*pairs["logprobs_from_logits"], (logits, labels, in_place))
    same(*pairs["entropy_from_logits"], (logits,))
    if len(shape) == 2:
        same(*pairs["entropy_from_logits_with_chunking"], (logits, 2))


def test_a_slice_of_the_logits_is_verls(pairs):
    logits, labels = torch.randn(3, 6, 50, requires_grad=True), torch.randint(50, (3, 6))
    same(*pairs["logprobs_from_logits"], (logits[:, :-1], labels[:, 1:]))
    same(*pairs["entropy_from_logits"], (logits[:, :-1],))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [2, 512])
def test_the_fused_head_is_verls(pairs, chunk_size, dtype):
    module = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO(chunk_size)
    hidden, weight = ((torch.randn(n, 16) / 2).to(dtype).requires_grad_() for n in (12, 130))
    labels = torch.randint(130, (12,))
    same(*pairs["FusedLinearForPPO.forward"], (module, hidden, weight, labels, 0.8))
    same(*pairs["FusedLinearForPPO.forward"], (module, hidden, weight.detach(), labels.int()))
    cube = hidden.detach().view(3, 4, 16).requires_grad_()
    same(*pairs["FusedLinearForPPO.forward"], (module, cube, weight, labels.view(3, 4)))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_verls_outside_the_mask_too(pairs, shift_mean):
    values, _, mask = padded(6, 50)
    for kept in (mask, mask.bool(), mask.float(), mask * 0.5):
        same(*pairs["masked_whiten"], (values * 7 + 3, kept, shift_mean))
    same(*pairs["masked_whiten"], (values.clone().requires_grad_(), mask, shift_mean))
    same(*pairs["masked_whiten"], (torch.where(mask == 1, values, torch.nan), mask, shift_mean))
    same(*pairs["masked_whiten"], (torch.ones(2, 5), torch.ones(2, 5), shift_mean))


@pytest.mark.parametrize("kept", [0, 1])
def test_whitening_nothing_or_one_number_raises_as_in_verl(pairs, kept):
    mask = torch.zeros(2, 3)
    mask[0, :kept] = 1
    errors = []
    for function in pairs["masked_whiten"]:
        with pytest.raises(ValueError, match="mask") as caught:
            function(torch.randn(2, 3), mask)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (1.2, 0.95)])
@pytest.mark.parametrize("shape", [(2, 3), (8, 33), (5, 257)])
def test_gae_is_verls_in_gaps_too(pairs, shape, gamma, lam):
    rewards, values, mask = padded(*shape)
    same(*pairs["compute_gae_advantage_return"], (rewards, values, mask, gamma, lam))
    same(*pairs["compute_gae_advantage_return"], (rewards, values, mask.float() * 0.5, gamma, lam))
    same(*pairs["compute_gae_advantage_return"], (rewards.double(), values.double(), mask, gamma, lam))


@pytest.mark.parametrize("gamma", [1.0, 0.97])
def test_reinforce_plus_plus_is_verls(pairs, gamma):
    if "compute_reinforce_plus_plus_outcome_advantage" not in pairs:
        pytest.skip("this verl starts anew after a gap, and its function is left alone")
    rewards, _, mask = padded(7, 31)
    same(*pairs["compute_reinforce_plus_plus_outcome_advantage"], (rewards, mask, types.SimpleNamespace(gamma=gamma)))


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_group_advantages_are_verls(pairs, groups):
    rewards, _, mask = padded(12, 9)
    rewards[3] = rewards[4]
    index = np.array([f"prompt {i}" for i in torch.randint(groups, (12,)).tolist()], dtype=object)
    for by_std in (True, False):
        same(*pairs["compute_grpo_outcome_advantage"], (rewards, mask, index, 1e-6, by_std))
    same(*pairs["compute_rloo_outcome_advantage"], (rewards, mask, index))


INFOS = [{}, {"dp_size": 1, "batch_num_tokens": 90}, {"dp_size": 4, "batch_num_tokens": 1000, "global_batch_size": 16}]


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize("far", [0.1, 1.0, 30.0, 200.0])
def test_the_offered_loss_is_the_vanilla_one_metrics_included(pairs, info, far):
    step, advantages, mask = padded(7, 41)
    advantages[3] = 0.0  # a group of equal rewards
    old = -step.abs()
    logprobs = (old + far * step).requires_grad_()
    for kept in (mask, mask.bool(), mask.float()):
        same(*pairs["compute_policy_loss_vanilla"], (old, logprobs, advantages, kept, "token-mean", Settings(info)))


def test_the_offered_loss_hands_other_settings_to_the_vanilla_one(pairs):
    step, advantages, mask = padded(5, 9)
    inputs = (step, (step * 1.1).requires_grad_(), advantages, mask)
    one_bound, tight = Settings({}), Settings({})
    one_bound.clip_ratio_high = None
    tight["clip_ratio_c"] = 1.05
    for settings in (one_bound, tight):
        same(*pairs["compute_policy_loss_vanilla"], (*inputs, "token-mean", settings))
    for mode in ("seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        same(*pairs["compute_policy_loss_vanilla"], (*inputs, mode, Settings({})))
    same(*pairs["compute_policy_loss_vanilla"], (*inputs, "token-mean", Settings({}), torch.rand(5, 9)))


def test_verls_own_configuration_takes_the_offered_loss(pairs):
    module = importlib.import_module("verl.workers.config")
    config = module.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=module.PolicyLossConfig(loss_mode="fastrlhf_ppo"),
    )
    assert config.policy_loss.get("loss_mode", "vanilla") == "fastrlhf_ppo"
    step, advantages, mask = padded(5, 9)
    inputs = (step, (step * 1.3).requires_grad_(), advantages, mask)
    same(*pairs["compute_policy_loss_vanilla"], (*inputs, "token-mean", config))


def test_verl_patches_itself_in_processes_that_name_our_external_module():
    script = f"import warnings; warnings.simplefilter('ignore'); import {CORE} as core; import fastrlhf.integrations\n"
    script += "print(core.compute_gae_advantage_return.__module__, 'fastrlhf_ppo' in core.POLICY_LOSS_REGISTRY)"
    path = os.pathsep.join([str(ROOT / "tests/peers"), str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "fastrlhf.integrations.external"}
    command = [sys.executable, "-c", f"import peer_verl\n{script}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "True"
