"""weight_sync:lora against a real vLLM: PPO on an adapter that the server gets before each rollout."""

from functools import partial

import pytest
import torch
from vllm_tools import EOS, differences, ppo_settings, prompts_of

from fastrlhf import PPO, PPOConfig
from fastrlhf.generation.engine import Sampling
from fastrlhf.generation.rollout_server import ServerBackend
from fastrlhf.generation.weight_sync import lora, whole
from fastrlhf.models.policy import Policy
from fastrlhf.runtime.http import ServerError

SYNC = "fastrlhf.generation.weight_sync:lora"


@pytest.fixture(scope="module")
def server(base_server):
    return base_server()


def adapted(models, rank=8):
    policy = Policy.from_pretrained(models / "base", freeze=True)
    return policy.adapt(None, rank=rank, alpha=32.0)


def change(adapter, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in adapter.parameters():
            factor.add_(torch.randn(factor.shape, generator=draw) * 0.1)


def lora_settings(models, url, folder, **changes):
    return ppo_settings(models, url, folder, **{"lora_rank": 4, "weight_sync": SYNC, **changes})


def test_each_adapter_is_used_as_soon_as_it_is_brought(server, models, tmp_path, note):
    policy = adapted(models)
    bring = partial(lora, policy, [server.url], folder=tmp_path / "w")
    backend = ServerBackend(server.url, "policy", eos_token_ids=[EOS], update_weights=bring)
    for seed in range(3):
        change(policy.adapter, seed)
        samples = backend.generate(prompts_of(3, 90, 180), Sampling(24), seeds=range(3))
        assert note("an adapter after it was brought: server and policy", differences(policy, samples)) < 1e-4
        assert len(list((tmp_path / "w").iterdir())) == 1
    backend.update_weights = None
    change(policy.adapter, 3)
    samples = backend.generate(prompts_of(3, 90, 180), Sampling(24), seeds=range(3))
    assert max(differences(policy, samples)) > 0.1  # what it is without
    del policy, backend, bring
    assert not (tmp_path / "w").exists()


def test_ppo_draws_from_the_adapter_that_it_trains(server, models, tmp_path, note):
    metrics = list(PPO(PPOConfig(**lora_settings(models, server.url, tmp_path))))
    found = [each["rollout/logprob_difference_max"] for each in metrics]
    assert len(found) == 3 and note("PPO with lora, a step each: server and policy", found) < 1e-4
    assert not (tmp_path / "out" / "rollout_weights").exists()


def test_ppo_without_the_adapters_draws_from_another_policy(server, models, tmp_path):
    def once(policy, urls, **options):
        if not seen:
            lora(policy, urls, **options)
        seen.append(urls)

    seen = []
    metrics = list(PPO(PPOConfig(**lora_settings(models, server.url, tmp_path, weight_sync=once))))
    found = [each["rollout/logprob_difference_max"] for each in metrics]
    assert len(seen) == 3 and found[0] < 1e-4 and min(found[1:]) > 0.05, found


def test_what_a_server_refuses_is_said_with_its_address_and_its_reason(server, models, tmp_path):
    policy = adapted(models, rank=16)
    with pytest.raises(ServerError) as caught:
        lora(policy, [server.url], folder=tmp_path / "w")
    assert f"weight_sync: {server.url}/v1/load_lora_adapter answered 500" in str(caught.value)
    assert "LoRA rank 16 is greater than max_lora_rank 8" in str(caught.value)
    with pytest.raises(ServerError, match="'base' conflicts with a served base model"):
        lora(adapted(models), [server.url], folder=tmp_path / "w", model="base")
    assert not (tmp_path / "w").exists()


def test_a_server_that_takes_no_weights_is_named_with_what_starts_one_that_does(server, models, tmp_path):
    with pytest.raises(ServerError, match=f"{server.url}/collective_rpc answered 404.*VLLM_SERVER_DEV_MODE=1"):
        whole(adapted(models), [server.url], folder=tmp_path / "w")
    assert not (tmp_path / "w").exists()
