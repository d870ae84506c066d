"""ServerBackend against a real vLLM: the same tokens where nothing is drawn, and the log-probabilities of what is."""

import pytest
from vllm_tools import EOS, differences, prompts_of

from fastrlhf.data.template import load_tokenizer
from fastrlhf.generation.engine import Engine, Sampling
from fastrlhf.generation.rollout_server import ServerBackend
from fastrlhf.models.policy import Policy

PROMPTS = prompts_of(3, 20, 90, 180)


@pytest.fixture(scope="module")
def policy(models):
    return Policy.from_pretrained(models / "base", freeze=True)


@pytest.fixture(scope="module")
def engine(models, policy):
    return Engine(policy.model, eos_token_ids=[EOS], max_slots=8, tokenizer=load_tokenizer(models / "base"))


@pytest.fixture(scope="module")
def backend(base_server):
    return ServerBackend(base_server().url, "base", eos_token_ids=[EOS])


def stops_of(engine, models):
    """Two strings that the first greedy response holds, one of them across tokens."""
    (sample, *_) = engine.generate(PROMPTS[:1], Sampling(40, greedy=True), seeds=[0])
    text = load_tokenizer(models / "base").decode(sample.response)
    return text[4:5], text[8:11]


@pytest.mark.parametrize("what", ["plain", "stops", "repetition"])
def test_greedy_responses_are_the_engines(engine, backend, models, note, what):
    options = {
        "plain": {},
        "stops": {"stop": stops_of(engine, models)},
        "repetition": {"repeat_ngram": 3, "repeat_times": 2},
    }
    sampling = Sampling(60, greedy=True, **options[what])
    ours = engine.generate(PROMPTS, sampling, seeds=range(4))
    theirs = backend.generate(PROMPTS, sampling, seeds=range(4))
    assert [each.response for each in theirs] == [each.response for each in ours]
    assert [each.finished for each in theirs] == [each.finished for each in ours]
    both = zip(ours, theirs, strict=True)
    gaps = [abs(p - q) for a, b in both for p, q in zip(a.logprobs, b.logprobs, strict=True)]
    assert note(f"greedy, {what}: server and engine", gaps) < 1e-4


def test_draws_have_the_policys_log_probabilities(backend, policy, note):
    prompts = [prompt for prompt in PROMPTS for _ in range(8)]
    samples = backend.generate(prompts, Sampling(48), seeds=range(len(prompts)))
    assert [sample.prompt for sample in samples] == prompts
    assert note("draws at temperature 1: server and policy", differences(policy, samples)) < 1e-4


def test_seeds_repeat_alone_and_in_company_and_differ_from_each_other(backend):
    many = [PROMPTS[1]] * 12
    first = [sample.response for sample in backend.generate(many, Sampling(24), seeds=range(12))]
    again = [sample.response for sample in backend.generate(many, Sampling(24), seeds=range(12))]
    alone = [backend.generate(many[:1], Sampling(24), seeds=[seed])[0].response for seed in range(3)]
    assert first == again and first[:3] == alone
    assert len({tuple(response) for response in first}) == 12
    # a CPU server reads 32 bits of a seed, the first 32 of these 64 say which run it is
    (other,) = backend.generate(many[:1], Sampling(24), seeds=[1 << 32])
    assert other.response != first[0]


def test_drawn_responses_end_with_the_token_that_completes_a_stop_string(backend, models):
    tokenizer, stop = load_tokenizer(models / "base"), ("a", "Q")
    samples = backend.generate([PROMPTS[0]] * 64, Sampling(60, stop=stop), seeds=range(64))
    stopped = 0
    for sample in samples:
        text = tokenizer.decode(sample.response, skip_special_tokens=True)
        before = tokenizer.decode(sample.response[:-1], skip_special_tokens=True)
        assert not any(each in before for each in stop)
        here = any(each in text for each in stop)
        assert sample.finished == (here or sample.response[-1] == EOS)
        stopped += here
    assert stopped > 8


def test_each_prompt_has_its_limit(backend):
    samples = backend.generate(PROMPTS, Sampling(20), seeds=range(4), limits=[1, 2, 3, 20])
    for sample, limit in zip(samples, [1, 2, 3, 20], strict=True):
        assert len(sample.response) == limit or (sample.finished and len(sample.response) < limit)


def test_a_temperature_whose_log_probabilities_the_server_does_not_tell_is_refused(base_server, backend):
    sampling = Sampling(4, temperature=0.7)
    with pytest.raises(ValueError, match="start it with --logprobs-mode processed_logprobs"):
        backend.generate(PROMPTS, sampling, seeds=range(4))
    options = {"eos_token_ids": [EOS], "logprobs_mode": "processed_logprobs"}  # which is not true
    with pytest.raises(ValueError, match=f"{base_server().url} tells log-probabilities of temperature 1, not 0.7"):
        ServerBackend(base_server().url, "base", **options).check(PROMPTS, sampling)


def test_prompts_that_the_server_cannot_read_are_refused_before_a_run(backend):
    backend.check(PROMPTS, Sampling(256 - 180))
    with pytest.raises(ValueError, match=r"reads 256 tokens \(max_model_len\), less than 180 tokens"):
        backend.check(PROMPTS, Sampling(256 - 179))
