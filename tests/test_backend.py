"""PPO whose responses come from servers: small ones that sample from a copy of the policy, with weights they got."""

import contextlib
import copy
import threading

import pytest
import torch
from fake_server import serving
from test_ppo import config, make_folder
from test_rollout_server import completion

from fastrlhf import PPO
from fastrlhf.generation.engine import Engine, Sampling
from fastrlhf.loops.backend import weight_hook
from fastrlhf.models.attention import ATTENTION
from fastrlhf.models.loading import load_causal_lm
from fastrlhf.runs import ranks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("servers"))


class Served:
    """Two servers of one model, and the function that brings them weights."""

    def __init__(self, folder, servers):
        self.model, self.servers, self.lock, self.calls = (
            load_causal_lm(folder / "model"),
            servers,
            threading.Lock(),
            [],
        )
        engine = Engine(self.model, eos_token_ids=[1])

        def answer(body, answered):
            with self.lock:
                sampling = Sampling(body["max_tokens"], stop=())
                (sample,) = engine.generate([body["prompt"]], sampling, seeds=[body["seed"]])
            told = {"token_ids": sample.response, "logprobs": {"token_logprobs": sample.logprobs}}
            answered["choices"][0].update(told, finish_reason="stop" if sample.finished else "length")
            return answered

        for server in servers:
            server.change = answer

    @property
    def urls(self):
        return [server.url for server in self.servers]

    def bring(self, policy, urls):
        self.calls.append((urls, [len(server.requests) for server in self.servers]))
        self.model.load_state_dict(policy.model.state_dict())


@pytest.fixture
def served(folder):
    with contextlib.ExitStack() as opened:
        yield Served(folder, [opened.enter_context(serving({"/v1/completions": completion})) for _ in range(2)])


def run(folder, name, **changes):
    return list(PPO(config(folder, output=str(folder / name), **changes)))


def test_a_run_on_servers_is_the_run_on_the_engine(folder, served):
    expected = run(folder, "engine")
    metrics = run(folder, "servers", rollout_url=", ".join(served.urls), weight_sync=served.bring)
    for ours, theirs in zip(metrics, expected, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-3, abs=1e-4)
        assert ours.get("rollout/logprob_difference_max", 0.0) < 1e-5  # none is told where all are equal
    assert served.calls == [(served.urls, [4 * step, 4 * step]) for step in range(3)]  # half of 8 responses each


def test_stale_weights_are_used_when_that_is_asked_for(folder, served):
    changes = {"rollout_url": served.urls[0], "weight_sync": "stale", "value_warmup_steps": 0}
    ppo = PPO(config(folder, output=str(folder / "stale"), **changes))
    before = copy.deepcopy(served.model.state_dict())
    differences = [metrics["rollout/logprob_difference"] for metrics in ppo]
    assert differences[0] < 1e-5 and differences[-1] > 1e-4
    assert not served.calls and len(served.servers[0].requests) == 24
    for name, tensor in served.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_first_process_alone_brings_weights(folder, served, monkeypatch):
    waited = []
    settings = config(folder, rollout_url=served.urls[0], weight_sync=served.bring)
    policy = type("Policy", (), {"model": served.model})
    monkeypatch.setattr(ranks, "gather", waited.append)
    monkeypatch.setattr(ranks, "is_first", lambda: False)
    weight_hook(settings, policy)()
    assert not served.calls and len(waited) == 1
    monkeypatch.setattr(ranks, "is_first", lambda: True)
    weight_hook(settings, policy)()
    assert len(served.calls) == 1 and len(waited) == 2
    assert served.model.config._attn_implementation == ATTENTION


@pytest.mark.parametrize(
    ("source", "text"), [("nowhere:push", "no module named 'nowhere'"), ("test_backend:none", "has no function 'none'")]
)
def test_a_weight_sync_that_is_no_function_is_named_before_the_run(folder, source, text):
    with pytest.raises(ValueError, match=f"weight_sync: .*{text}"):
        PPO(config(folder, output=str(folder / "none"), rollout_url="http://127.0.0.1:1", weight_sync=source))
