"""A reward over HTTP is the function that the server serves, to the last bit; what is no score is refused."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
import torch
from fake_server import serving
from loops import ROOT, model_folder, write_rows
from tiny import tiny_tokenizer

from fastrlhf.data import Prompt
from fastrlhf.generation.engine import Sample
from fastrlhf.packing import pack
from fastrlhf.rewards.reward_server import RewardClient
from fastrlhf.rewards.scorer import Scorer
from fastrlhf.rewards.serve import RewardHTTPServer, main
from fastrlhf.runtime.http import ServerError
from fastrlhf.settings.best_of_n import SweepConfig
from fastrlhf.settings.ppo import PPOConfig
from fastrlhf.settings.trust import EvaluateRewardConfig
from fastrlhf.trainers.ppo.trainer import PPO

RULES = """
import math

def score(prompts, responses, *, response_ids, finished, weight):
    rows = zip(prompts, responses, response_ids, finished, weight, strict=True)
    return [math.sin(len(p) + sum(map(ord, r)) + 7 * len(i) + f) * w for p, r, i, f, w in rows]
"""
GIVEN = {"response_ids": [[5], [5, 6], [7]], "finished": [True, False, True], "answer": [[1], None, {"a": "ü"}]}
TEXTS = ["p", "q", "r"], ["x", "yy", "ö"]


def lengths(body):
    return {"scores": [len(text) / 4 for text in body["responses"]]}


def server(running, path="/score", **options):
    return RewardClient(
        running.url + path, **{"timeout": 5.0, "columns": ["answer"], "batch": None, "key_file": None, **options}
    )


@contextmanager
def served(function, key=None):
    """The URL of a server of ours in a thread."""
    with RewardHTTPServer(("127.0.0.1", 0), function, key) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}/any/path"
        finally:
            running.shutdown()
            thread.join()


@pytest.mark.usefixtures("one_thread")
def test_ppo_against_the_shipped_server_is_ppo_against_the_function_bit_for_bit(tmp_path, monkeypatch):
    (tmp_path / "served_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "key").write_text("secret\n")
    command = [sys.executable, "-u", "-m", "fastrlhf.rewards.serve", "served_rules:score", "--port=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--key-file=key"], cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True
    )
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": f"p{n}", "weight": n / 7} for n in range(8)])
    settings = {"model": model_folder(tmp_path / "m"), "data": data, "eval_data": data, "eval_limit": 3}
    settings |= {"steps": 2, "batch_size": 4, "max_new_tokens": 4}
    settings |= {"samples_per_prompt": 2, "estimator": "grpo"}
    try:
        url = process.stdout.readline().split()[-1]
        server = {"reward": url, "reward_key_file": str(tmp_path / "key")}
        rewards = {"function": {"reward": "served_rules:score"}, "server": server}
        for name, reward in rewards.items():
            with PPO(PPOConfig(output=str(tmp_path / name), **settings, **reward)) as trainer:
                assert len(list(trainer)) == 2
        with pytest.raises(ServerError, match="answered 401: the key is missing or wrong"):
            RewardClient(url, columns=[], timeout=5.0, batch=None, key_file=None)
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert "Traceback" not in errors
    for name in ("metrics.jsonl", "model/model.safetensors", "samples.jsonl"):
        files = [(tmp_path / folder / name).read_bytes() for folder in rewards]
        assert files[0] == files[1]
    with pytest.raises(ValueError, match="resume: reward was 'http://127"):
        PPO(PPOConfig(output=str(tmp_path / "server"), resume=True, reward=url + "/other", **settings))


def test_servers_and_functions_combine_and_each_batch_is_a_request():
    samples = [Sample([10, 11], list(range(12, 15 + n)), [0.0] * (3 + n), [0.0] * (3 + n), True) for n in range(5)]
    prompts = [Prompt(s.prompt, "p", {"kind": n}) for n, s in enumerate(samples)]
    batch = pack([s.prompt + s.response for s in samples], prompt_lengths=[2] * 5)
    answers = {"/a": lengths, "/b": lambda body: {"scores": [-3 * kind for kind in body["columns"]["kind"]]}}
    with serving(answers) as running:
        reward = f"min({running.url}/a|{running.url}/b)=2,{running.url}/a"
        scorer = Scorer(reward, tiny_tokenizer(), max_tokens=64, columns={"kind"}, reward_batch=2)
        assert scorer.names == ["a", "b"]
        found = scorer(prompts, samples, batch)
        sizes = [len(body["responses"]) for body, _ in running.requests]
    assert sorted(sizes) == [0, 0, 1, 1, 2, 2, 2, 2]
    a = torch.tensor([len(text) / 4 for text in tiny_tokenizer().batch_decode([s.response for s in samples])])
    b = -3.0 * torch.arange(5)
    torch.testing.assert_close(found, 2 * torch.minimum(a, b) + a)


def test_a_request_has_the_documented_fields_and_the_order_is_kept():
    with serving({"/score": lengths}) as running:
        assert server(running, batch=2)(*TEXTS, **GIVEN) == [0.25, 0.5, 0.25]
        first, *others = [body for body, _ in running.requests]
    names = {"prompts", "responses", "response_ids", "finished"}
    assert first == {**{name: [] for name in names}, "columns": {"answer": []}}
    others.sort(key=lambda body: len(body["responses"]), reverse=True)
    assert [body["responses"] for body in others] == [["x", "yy"], ["ö"]]
    assert others[1] == {
        **{"prompts": ["r"], "responses": ["ö"], "response_ids": [[7]], "finished": [True]},
        "columns": {"answer": [{"a": "ü"}]},
    }


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"score": [1, 2, 3]}, 'did not answer {"scores": [...]}: {"score": [1, 2, 3]}'),
        ({"scores": {"0": 1}}, 'did not answer {"scores": [...]}'),
        ({"scores": [1, 2]}, "answered 2 scores for 3 responses"),
        ({"scores": [1, 2, 3, 4]}, "answered 4 scores for 3 responses"),
        ({"scores": [1, None, 3]}, "answered null for response 1 of 3; a score is a finite number"),
        ({"scores": [1, 2, "3"]}, 'answered "3" for response 2 of 3'),
        ({"scores": [True, 2, 3]}, "answered true for response 0 of 3"),
        ({"scores": [1, float("-inf"), 3]}, "answered -Infinity for response 1 of 3"),
        ({"scores": [1, float("nan"), 3]}, "did not answer in JSON: NaN is no JSON"),
        ({"scores": [[1], [2], [3]]}, "answered [1] for response 0 of 3"),
        ({"scores": [10**400, 2, 3]}, " for response 0 of 3"),
        ((500, json.dumps({"error": "KeyError: 'answer'\x1b[31m"})), "answered 500: KeyError: 'answer'"),
        ((404, "no such path"), "answered 404: no such path"),
    ],
)
def test_what_is_no_score_for_each_response_is_refused(answer, words):
    with serving({"/score": lambda body: answer if body["responses"] else lengths(body)}) as running:
        reward = server(running)
        with pytest.raises(ServerError) as raised:
            reward(*TEXTS, **GIVEN)
    assert str(raised.value).startswith(f"reward: {running.url}/score ") and words in str(raised.value)
    assert str(raised.value).isprintable()


def test_a_busy_server_is_asked_again_and_a_slow_one_is_given_up():
    busy = [(503, "starting"), (429, "later")]
    with serving({"/score": lambda body: busy.pop() if body["responses"] and busy else lengths(body)}) as running:
        assert server(running)(*TEXTS, **GIVEN) == [0.25, 0.5, 0.25]
    go_on = threading.Event()
    with serving({"/score": lambda body: (body["responses"] and not go_on.wait(20)) or lengths(body)}) as running:
        with pytest.raises(ServerError, match=r"gave no answer in 0\.3 s; raise reward_timeout"):
            server(running, timeout=0.3)(*TEXTS, **GIVEN)
        go_on.set()


def test_a_server_that_is_none_stops_the_run_at_its_start():
    with serving({"/score": lambda _: (404, "nothing here")}) as running:
        url = running.url + "/score"
        with pytest.raises(ServerError, match="answered 404: nothing here"):
            Scorer(url, tiny_tokenizer(), max_tokens=9)
    with pytest.raises(ServerError, match=r"cannot be reached: .*tried 3 times"):
        Scorer(url, tiny_tokenizer(), max_tokens=9)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("http://host/score?version=2", "has a ?, after which"),
        ("mean(http://host/a?k=v|x)=2", "http://host/a?k=v' has a ?, after which"),
        ("ftp://host/score", "is no server; one is given as http"),
        ("localhost:8000/score", "a server is given as http://localhost:8000/score"),
        ("http://user:word@host/score", "no user and no password may stand in it"),
    ],
)
def test_an_url_that_is_none_is_refused_with_the_right_spelling(reward, words):
    with pytest.raises(ValueError) as raised:
        Scorer(reward, tiny_tokenizer(), max_tokens=9)
    assert words in str(raised.value)


def test_a_column_that_is_no_json_is_named():
    with serving({"/score": lengths}) as running:
        reward = server(running)
        for value in (b"x", {1, 2}, float("nan")):
            with pytest.raises(TypeError, match="the column 'answer' cannot be sent to a reward server as JSON"):
                reward(*TEXTS, **{**GIVEN, "answer": [value] * 3})


def test_the_key_goes_to_one_origin_and_settings_of_servers_want_one():
    ppo = {"model": "m", "data": "d", "output": "o"}
    both = "http://a:1/x=0.5,min(http://a:1/y|https://b/z)"
    with pytest.raises(ValueError, match="one server would get the key of another: http://a:1, https://b"):
        PPOConfig(**ppo, reward=both, reward_key_file="k")
    with pytest.raises(ValueError, match="one server would get the key of another"):
        PPOConfig(**ppo, reward="http://a/x", eval_data="e", eval_reward="http://b/x", reward_key_file="k")
    assert PPOConfig(**ppo, reward="http://a:1/x=0.5,http://a:1/y", reward_key_file="k").reward_key_file == "k"
    for name, value in (("reward_key_file", "k"), ("reward_batch", 4)):
        with pytest.raises(ValueError, match=f"{name} is for reward servers, and no reward is the URL of one"):
            PPOConfig(**ppo, reward="a:b,folder", **{name: value})
    assert SweepConfig(**ppo, first="a:b", second="http://h/x", reward_batch=4).reward_options()["reward_batch"] == 4
    assert EvaluateRewardConfig(**{**ppo, "model": "http://h/x"}, reward_key_file="k").reward_timeout == 3600
    for value in (0, -1, 1e12):
        with pytest.raises(ValueError, match="reward_timeout must be"):
            PPOConfig(**ppo, reward="a:b", reward_timeout=value)


def test_an_error_of_the_served_function_reaches_the_run(capfd):
    def fails(prompts, responses):
        raise KeyError("answer")

    with served(fails) as url, pytest.raises(ServerError, match="answered 500: KeyError: 'answer'"):
        RewardClient(url, columns=[], timeout=5.0, batch=None, key_file=None)(*TEXTS, **GIVEN)
    assert 'raise KeyError("answer")' in capfd.readouterr().err


def test_the_server_refuses_a_function_that_is_none(capsys):
    with pytest.raises(SystemExit):
        main(["no_such_rules:score"])
    assert "function: no module named 'no_such_rules'" in capsys.readouterr().err


@pytest.mark.parametrize("length", ["999999999999", "-1", "many"])
def test_the_server_reads_no_request_of_an_absurd_length(length):
    with served(lambda prompts, responses: [0.0] * len(responses)) as url:
        connection = HTTPConnection(urlsplit(url).netloc, timeout=5)
        connection.request("POST", "/", headers={"Content-Length": length})
        answer = connection.getresponse()
        assert (answer.status, b"Content-Length" in answer.read()) == (413, True)
        connection.close()
