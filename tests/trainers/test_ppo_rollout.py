"""PPO whose responses come from servers: small ones that sample from a copy of the policy, with weights they got."""

import contextlib
import copy
import threading
import urllib.request

import pytest
import torch
from fake_server import serving
from hostile_server import answer, hostile
from ppo_runs import config, make_folder
from vllm_answers import completion

from fastrlhf import PPO
from fastrlhf.generation.engine import Engine, Sampling
from fastrlhf.generation.rollout_server import server_seed
from fastrlhf.models.attention import ATTENTION
from fastrlhf.models.loading import load_causal_lm
from fastrlhf.runtime import distributed
from fastrlhf.runtime.http import HTTPClient, ServerError
from fastrlhf.trainers.ppo.rollout import weight_hook

pytestmark = pytest.mark.usefixtures("one_thread")
# the seeds of runs with seed 0, by those that the servers get for them
ENGINE_SEEDS = {server_seed(seed): seed for seed in range(1000)}


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
                (sample,) = engine.generate([body["prompt"]], sampling, seeds=[ENGINE_SEEDS[body["seed"]]])
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
    monkeypatch.setattr(distributed, "all_gather", waited.append)
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    weight_hook(settings, policy)()
    assert not served.calls and len(waited) == 1
    monkeypatch.setattr(distributed, "is_main_process", lambda: True)
    weight_hook(settings, policy)()
    assert len(served.calls) == 1 and len(waited) == 2
    assert served.model.config._attn_implementation == ATTENTION


@pytest.mark.parametrize(
    ("source", "text"),
    [("nowhere:push", "no module named 'nowhere'"), ("ppo_runs:none", "has no function 'none'")],
)
def test_a_weight_sync_that_is_no_function_is_named_before_the_run(folder, source, text):
    with pytest.raises(ValueError, match=f"weight_sync: .*{text}"):
        PPO(config(folder, output=str(folder / "none"), rollout_url="http://127.0.0.1:1", weight_sync=source))


def test_a_hook_gets_the_key_where_it_asks_for_it(folder, tmp_path):
    got = []

    def with_key(policy, urls, api_key=None):
        got.append((urls, api_key))

    settings = config(folder, rollout_url="http://a, http://b", weight_sync=with_key)
    weight_hook(settings, None, "SECRET")()
    weight_hook(config(folder, rollout_url="http://a", weight_sync=lambda *both: got.append(both)), 7, "SECRET")()
    assert got == [(["http://a", "http://b"], "SECRET"), (7, ["http://a"])]


def urllib_hook(policy, urls):
    urllib.request.urlopen(urllib.request.Request(f"{urls[0]}/v1/load_lora_adapter", b"{}"))


def our_hook(policy, urls):
    HTTPClient("lora", urls[0], timeout=5).post_text("/v1/load_lora_adapter", {})


def wrong_hook(policy, urls):
    policy.adapter.save("folder")


@pytest.mark.parametrize(
    ("hook", "text"),
    [
        (urllib_hook, "/v1/load_lora_adapter answered 500: rank 64 is above 16 (with ***)"),
        (our_hook, "/v1/load_lora_adapter answered 500: rank 64 is above 16 (with ***)"),
        (wrong_hook, "AttributeError: 'NoneType' object has no attribute 'adapter' ("),
    ],
)
def test_an_error_of_a_hook_names_it_the_servers_and_the_reason(folder, hook, text):
    said = answer({"error": {"message": "rank 64 is above 16\n(with SECRET)"}}, "500 Internal Server Error")
    with hostile(said) as server, pytest.raises(ServerError) as caught:
        weight_hook(config(folder, rollout_url=server.url, weight_sync=hook), None, "SECRET")()
    assert str(caught.value).startswith(f"weight_sync={hook.__name__} failed for {server.url}: ")
    assert text in str(caught.value) and str(caught.value).isprintable()


def test_the_key_of_a_file_reaches_the_servers_and_nothing_else(folder, served, tmp_path, capsys):
    key, output = tmp_path / "key", tmp_path / "out"
    key.write_text("SECRET\n")
    changes = {"rollout_url": served.urls[0], "weight_sync": "stale", "rollout_key_file": str(key), "steps": 1}
    list(PPO(config(folder, output=str(output), **changes, value_warmup_steps=0)))
    assert {headers["Authorization"] for _, headers in served.servers[0].requests} == {"Bearer SECRET"}
    assert not any(b"SECRET" in file.read_bytes() for file in output.rglob("*") if file.is_file())
    assert "SECRET" not in "".join(capsys.readouterr())


def test_servers_that_cannot_do_it_are_named_before_the_run(folder, served, tmp_path):
    served.servers[0].models = [{"id": "policy", "max_model_len": 8}]
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"reads 8 tokens \(max_model_len\), less than"):
        PPO(config(folder, output=str(output), rollout_url=served.urls[0], weight_sync="stale"))
    assert not output.exists()


def test_servers_without_the_weights_of_the_policy_are_noticed_once(folder, served, capsys):
    changes = {"learning_rate": 0.02, "value_warmup_steps": 0}
    never = {"rollout_url": served.urls[0], "weight_sync": lambda policy, urls: None}
    run(folder, "never", **never, **changes)
    said = capsys.readouterr().out
    assert said.count("warning: log-probabilities of the servers are") == 1 and "a prefix cache" in said
    run(folder, "stale_fast", **never | {"weight_sync": "stale"}, **changes)
    run(folder, "always", **never | {"weight_sync": served.bring}, **changes)
    assert "log-probabilities of the servers" not in capsys.readouterr().out


def test_a_backend_that_leaves_out_a_response_is_refused(folder):
    class Fewer:
        def __init__(self, engine):
            self.engine = engine

        def generate(self, prompts, *args, seeds, **options):
            return self.engine.generate(prompts[1:], *args, seeds=seeds[1:], **options)

    plain = PPO(config(folder, output=str(folder / "whole")))
    trainer = PPO(config(folder, output=str(folder / "fewer")), backend=lambda policy: Fewer(plain.rollout.engine))
    with pytest.raises(ValueError, match=r"backend: must return a sample for each of \d+ prompts, in order, got \d+"):
        next(trainer)
