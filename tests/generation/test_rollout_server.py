"""The backend that talks to a vLLM server, against a small server that answers as vLLM's completions endpoint does."""

import math
import time

import pytest
from compare import filled
from engines import engine_of, model_of
from fake_server import FakeServer, serving
from vllm_answers import ENDS, EOS, LONG, completion

from fastrlhf.generation.engine import Sampling
from fastrlhf.generation.rollout_server import ServerBackend, server_seed
from fastrlhf.generation.sampling import RolloutBackend
from fastrlhf.generation.server import ServerError

# of vLLM's CompletionRequest (vllm/entrypoints/openai/completion/protocol.py), those that matter here
FIELDS = {
    *("model", "prompt", "max_tokens", "seed", "temperature", "top_k", "top_p", "min_p", "min_tokens", "logprobs"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos", "stop", "stop_token_ids"),
    *("return_token_ids", "repetition_detection"),
}


@pytest.fixture
def server():
    with serving({"/v1/completions": completion}) as running:
        yield running


def backend_of(server, **options):
    return ServerBackend(server.url, "policy", **{"eos_token_ids": [EOS], "timeout": 20, **options})


PROMPTS = [[5, 6, 7], [200], [200], [9, 40]]


def test_token_ids_go_out_and_samples_come_back_in_the_order_of_the_prompts(server):
    server.change = lambda body, answer: time.sleep(0.05 * (len(body["prompt"]) == 3)) or answer
    drawn = []
    samples = backend_of(server).generate(
        PROMPTS, Sampling(6), seeds=[LONG[0], ENDS[0], LONG[1], ENDS[1]], limits=[6, 6, 5, 2], progress=drawn.append
    )
    assert [s.prompt for s in samples] == PROMPTS
    assert [s.response for s in samples] == [
        [8, 9, 10, 11, 12, 13],
        [201, 202, EOS],
        [201, 202, 203, 204, 205],
        [41, EOS],
    ]
    assert [s.finished for s in samples] == [False, True, False, True]
    assert samples[1].logprobs == samples[1].sampler_logprobs == [0.0, -0.25, -0.5]
    assert sorted(drawn) == [2, 3, 5, 6]


def test_a_request_says_all_that_the_server_could_fill_in_otherwise(server):
    sampling = Sampling(9, stop=("\n\n", "END"), repeat_ngram=4, repeat_times=3)
    backend_of(server, api_key="secret").generate([[3, 4]], sampling, seeds=[-(2**63)])
    ((body, headers),) = server.requests
    assert body == {
        "model": "policy",
        "prompt": [3, 4],
        "seed": server_seed(-(2**63)),
        "max_tokens": 9,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": [EOS],
        "stop": ["\n\n", "END"],
        "logprobs": 0,
        "return_token_ids": True,
        "repetition_detection": {"min_pattern_size": 1, "max_pattern_size": 4, "min_count": 3},
    }
    assert set(body) <= FIELDS and headers["Authorization"] == "Bearer secret"


def test_greedy_asks_for_temperature_zero_and_has_no_sampler_logprobs(server):
    (sample,) = backend_of(server).generate([[3]], Sampling(4, greedy=True), seeds=LONG[:1])
    assert server.requests[0][0]["temperature"] == 0.0
    assert sample.logprobs == [0.0, -0.25, -0.5, -0.75] and not any(sample.sampler_logprobs)


def test_requests_run_side_by_side_up_to_the_limit(server):
    server.change = lambda body, answer: time.sleep(0.05) or answer
    backend_of(server, max_requests=3).generate([[2]] * 9, Sampling(2), seeds=range(9))
    assert server.most_running == 3


def test_weights_are_brought_before_each_rollout(server):
    seen = []
    backend = backend_of(server, update_weights=lambda: seen.append(len(server.requests)))
    for _ in range(2):
        backend.generate([[2]] * 3, Sampling(2), seeds=range(3))
    assert seen == [0, 3]


def changed(**fields):
    return lambda body, answer: answer["choices"][0].update(fields) or answer


def test_a_response_cut_for_repetition_is_not_finished(server):
    server.change = changed(finish_reason="repetition", token_ids=[3, 4, 4])
    (sample,) = backend_of(server).generate([[2]], Sampling(4, repeat_ngram=1, repeat_times=2), seeds=ENDS[:1])
    assert not sample.finished


def logprobs(*values):
    return changed(logprobs={"token_logprobs": list(values)})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (changed(token_ids=None), "prompt 0: the answer has no token_ids; the server must know return_token_ids"),
        (changed(token_ids=[]), "token_ids must be a list of at least one, got []"),
        (changed(token_ids="abc"), "token_ids must be a list of at least one, got 'abc'"),
        (changed(token_ids={"a": 1}), "token_ids must be a list of at least one, got {'a': 1}"),
        (changed(token_ids=[5, 6, 300]), "token_ids must be whole numbers from 0 to 299, got 300"),
        (changed(token_ids=[5, 6, 10**400]), "token_ids must be whole numbers from 0 to 299, got 1000"),
        (changed(token_ids=[-1, 6, 1]), "token_ids must be whole numbers from 0 to 299, got -1"),
        (changed(token_ids=[1.5, 6, 1]), "token_ids must be whole numbers from 0 to 299, got 1.5"),
        (changed(token_ids=[True, 6, 1]), "token_ids must be whole numbers from 0 to 299, got True"),
        (changed(token_ids=[5, "\x1b[31m", 1]), r"token_ids must be whole numbers from 0 to 299, got '\x1b[31m'"),
        (changed(token_ids=[5] * 6 + [1]), "the response has 7 tokens, 6 were asked for"),
        (changed(token_ids=[5, 1, 6]), "the response goes on after a token of stop_token_ids"),
        (changed(token_ids=[5, 6, 7]), "finish_reason is stop, but the last token 7 is not of stop_token_ids"),
        (changed(token_ids=[5, 6, 7], finish_reason="length"), "the response was cut after 3 tokens, 6 were asked for"),
        (changed(finish_reason="repetition"), "the response was cut for a repetition, which was not asked for"),
        (changed(finish_reason="abort"), "the response ended with finish_reason 'abort'"),
        (changed(finish_reason=[]), "the response ended with finish_reason []"),
        (changed(finish_reason=None), "the response ended with finish_reason None"),
        (changed(logprobs=None), "does not have a log-probability for each of its 3 tokens"),
        (changed(logprobs=[1]), "does not have a log-probability for each of its 3 tokens"),
        (changed(logprobs={"token_logprobs": 3}), "does not have a log-probability for each of its 3 tokens"),
        (logprobs(0.0), "does not have a log-probability for each of its 3 tokens"),
        (logprobs(0.0, None, 0.0), "None is no log-probability"),
        (logprobs(0.0, "-1", 0.0), "-1 is no log-probability"),
        (logprobs(0.0, False, 0.0), "False is no log-probability"),
        (logprobs(0.0, 0.01, 0.0), "0.01 is no log-probability"),
        (logprobs(0.0, -(10**400), 0.0), "-1000"),
        (logprobs(0.0, float("-inf"), 0.0), "a token that was drawn has the log-probability -inf"),
        (logprobs(0.0, -1e39, 0.0), "a token that was drawn has the log-probability -1e+39"),  # -inf in float32
        (logprobs(0.0, float("nan"), 0.0), "did not answer in JSON: NaN is no JSON"),
        (changed(prompt_token_ids=[6, 7]), "the server read other tokens than the 3 of the prompt: [6, 7]"),
        (changed(prompt_token_ids=3), "the server read other tokens than the 3 of the prompt: 3"),
        (lambda *_: {"choices": []}, "the answer is not a completion with one choice: {'choices': []}"),
        (lambda _, answer: {"choices": answer["choices"] * 2}, "the answer is not a completion with one choice: "),
        (lambda *_: {"choices": [3]}, "the answer is not a completion with one choice: {'choices': [3]}"),
        (lambda *_: [], "did not answer with a JSON object; it said: []"),
        (lambda *_: (200, "<html>"), "did not answer in JSON"),
        (lambda *_: (400, '{"error": {"message": "too long"}}'), "/v1/completions answered 400: too long"),
        (lambda *_: (500, "out of memory"), "/v1/completions answered 500: out of memory"),
    ],
)
def test_an_answer_that_cannot_be_used_is_named(server, change, text):
    server.change = change
    with pytest.raises(ServerError) as caught:
        backend_of(server, vocab_size=300).generate([[5, 6, 7]], Sampling(6), seeds=ENDS[:1])
    assert text in str(caught.value) and server.url in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_eos_at_the_limit_ends_a_response_whatever_the_server_calls_it(server):
    server.change = changed(finish_reason="length")
    (sample,) = backend_of(server).generate([[5]], Sampling(3), seeds=ENDS[:1])
    assert sample.finished and sample.response[-1] == EOS


def test_rounding_above_0_is_taken(server):
    server.change = logprobs(1e-6, -1.0, 0.0)
    (sample,) = backend_of(server).generate([[5]], Sampling(3), seeds=ENDS[:1])
    assert sample.logprobs == [1e-6, -1.0, 0.0]


def test_seeds_of_32_bits_tell_runs_steps_and_samples_apart():
    runs = [[server_seed((run << 32) + n) for n in range(2**14)] for run in range(4)]
    assert all(0 <= seed < 2**32 for run in runs for seed in run)
    every = [seed for run in runs for seed in run]
    # pairs that are equal by chance: n^2 / 2^33 of n = 2^16, which is 0.5; with the low bits alone there were 3 n / 4
    assert len(every) - len(set(every)) <= 5
    assert all(len({run[n] for run in runs}) == 4 for n in range(2**14))
    assert len({server_seed(seed) for seed in (-(2**63), -1, 0, 1, 2**63 - 1)}) == 5


def test_a_run_that_needs_more_than_the_server_reads_is_refused_at_the_start(server):
    server.models = [{"id": "base", "max_model_len": 10}, {"id": "policy", "max_model_len": None, "parent": "base"}]
    backend_of(server).check([[1] * 4, [1]], Sampling(6))
    with pytest.raises(
        ValueError, match=r"reads 10 tokens \(max_model_len\), less than 5 tokens of the longest prompt"
    ):
        backend_of(server).check([[1], [1] * 5], Sampling(6))
    server.models = server.models[:1]  # the adapter comes with the first weights
    with pytest.raises(ValueError, match="start it with --max-model-len 11"):
        backend_of(server, update_weights=lambda: None).check([[1] * 5], Sampling(6))
    with pytest.raises(ServerError, match="serves base, not policy"):
        backend_of(server).check([[1]], Sampling(6))
    server.models = []
    with pytest.raises(ServerError, match="serves no model, not policy"):
        backend_of(server, update_weights=lambda: None).check([[1]], Sampling(6))
    server.models = [{"id": "policy", "max_model_len": "10"}]
    with pytest.raises(ServerError, match=r"gives no whole numbers as max_model_len: \['10'\]"):
        backend_of(server).check([[1]], Sampling(6))


LOGITS = [3.0, 2.5, 1.0, -1.0, -2.0, -4.0]


def likeliest(temperature, num):
    scaled = [logit / temperature for logit in LOGITS]
    total = math.log(math.fsum(map(math.exp, scaled)))
    return {f"token_id:{n}": scaled[n] - total for n in range(num)}


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_log_probabilities_of_another_temperature_are_found_at_the_start(server, mode):
    def told(body, answer):
        last = len(LOGITS) - 1  # what was drawn is told too, and need not be among the likeliest
        temperature = body["temperature"] if mode == "processed" else 1.0
        top = likeliest(temperature, body["logprobs"])
        if body["temperature"] == 2:
            top |= {f"token_id:{last}": likeliest(temperature, last + 1)[f"token_id:{last}"]}
        return {"choices": [{"logprobs": {"top_logprobs": [top]}}]}

    server.change = told
    backend = backend_of(server, logprobs_mode="processed_logprobs")
    backend.check([[2]], Sampling(4))
    assert not server.requests  # at temperature 1 both modes are the same
    if mode == "processed":
        backend.check([[2]], Sampling(4, temperature=0.7))
    else:
        with pytest.raises(ValueError, match=r"log-probabilities of temperature 1, not 0\.7; start it with --log"):
            backend.check([[2]], Sampling(4, temperature=0.7))
    server.change = lambda body, answer: answer
    with pytest.raises(ServerError, match="told no log-probabilities of the 5 likeliest tokens"):
        backend.check([[2]], Sampling(4, temperature=0.7))
    server.models = []
    with pytest.raises(ServerError, match="serves no model"):
        backend_of(server, logprobs_mode="processed_logprobs", update_weights=lambda: None).check(
            [[2]], Sampling(4, temperature=0.7)
        )


def test_a_model_that_is_not_served_is_named(server):
    with pytest.raises(ServerError, match="serves base, policy, not other"):
        ServerBackend(server.url, "other", eos_token_ids=[]).generate([[2]], Sampling(2), seeds=[0])


def test_a_server_that_is_not_there_is_named():
    with FakeServer({}) as closed:
        url = closed.url
    with pytest.raises(ServerError, match=f"{url} cannot be reached"):
        ServerBackend(url, "policy", eos_token_ids=[]).generate([[2]], Sampling(2), seeds=[0])


def test_a_server_that_is_too_slow_is_named(server):
    server.change = lambda body, answer: time.sleep(1) or answer
    with pytest.raises(ServerError, match=r"gave no answer in 0\.2 s; raise rollout_timeout"):
        backend_of(server, timeout=0.2).generate([[2]], Sampling(2), seeds=[0])


@pytest.mark.parametrize(
    ("sampling", "options", "text"),
    [
        (Sampling(4, top_k=5), {}, "before or after top_k, top_p, min_p and min_new_tokens, not both"),
        (Sampling(4, min_new_tokens=2), {}, "leave them at their defaults"),
        (Sampling(4, temperature=0.7), {}, "temperature 1, not 0.7; start it with --logprobs-mode processed_logprobs"),
        (Sampling(4, temperature=0.7, greedy=True), {"logprobs_mode": "processed_logprobs"}, "temperature 1, not 0.7"),
        (Sampling(4, temperature=2.1), {}, "servers take a temperature from 0.01 to 2.0, got 2.1"),
        (Sampling(4, temperature=0.009), {}, "servers take a temperature from 0.01 to 2.0, got 0.009"),
        (Sampling(4), {"seeds": [1, 2]}, "seeds must be one a prompt, 1 in all, got 2"),
        (Sampling(4), {"limits": [5]}, "limits must be from 1 to max_new_tokens=4, got 5 for prompt 0"),
        (Sampling(4), {"prompts": [[]]}, "prompt 0 is empty"),
    ],
)
def test_what_the_server_cannot_do_is_refused_before_it_is_asked(sampling, options, text):
    mode = {"logprobs_mode": options.pop("logprobs_mode", "raw_logprobs")}
    backend = ServerBackend("http://127.0.0.1:1", "policy", eos_token_ids=[], **mode)
    with pytest.raises(ValueError) as caught:
        backend.generate(**{"prompts": [[2]], "sampling": sampling, "seeds": [0], **options})
    assert "ServerBackend: " in str(caught.value) and text in str(caught.value)


def test_another_temperature_is_taken_where_the_server_tells_its_logprobs(server):
    (sample,) = backend_of(server, logprobs_mode="processed_logprobs").generate(
        [[3]], Sampling(2, temperature=0.7), seeds=LONG[:1]
    )
    assert server.requests[0][0]["temperature"] == 0.7 and sample.logprobs == [0.0, -0.25]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"url": "localhost:8000"}, "url must start with http:// or https://, got 'localhost:8000'"),
        ({"logprobs_mode": "raw_logits"}, "logprobs_mode must be raw_logprobs or processed_logprobs"),
        ({"max_requests": 0}, "max_requests must be at least 1, got 0"),
        ({"timeout": 0}, "timeout must be above 0, got 0"),
        ({"url": []}, "give a url"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(ValueError) as caught:
        ServerBackend(**{"url": "http://x", "model": "m", "eos_token_ids": [], **options})
    assert f"ServerBackend: {text}" in str(caught.value)


def test_engine_and_server_are_exchangeable(server):
    backends: list[RolloutBackend] = [engine_of(model_of()), backend_of(server)]
    for backend in filled(backends):
        samples = backend.generate(PROMPTS, Sampling(6), seeds=range(4), limits=[6, 5, 4, 3])
        assert [s.prompt for s in samples] == PROMPTS
        assert all(0 < len(s.response) == len(s.logprobs) == len(s.sampler_logprobs) <= 6 for s in filled(samples))
        assert all(s.finished == (s.response[-1] == EOS) for s in filled(samples))
        assert backend.generate([], Sampling(6), seeds=[]) == []


def test_a_process_without_a_prompt_takes_part_in_bringing_the_weights(server):
    brought = []
    backend = backend_of(server, update_weights=lambda: brought.append(1))
    assert backend.generate([], Sampling(6), seeds=[]) == [] and brought == [1]
