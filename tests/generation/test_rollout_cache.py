"""The engine's memory, planned and held, and samples that stream as they end."""

import pytest
import torch
from engines import engine_of, model_of, prompts_of

from fastrlhf.generation.engine import Sampling
from fastrlhf.generation.kv_cache import CachePlan


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_planned_cache_is_the_cache_that_is_held(arch, autocast):
    model = model_of(arch)
    engine = engine_of(model, eos=(), max_slots=3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plan = engine.cache_plan(prompts_of(), Sampling(30))
        engine.generate(prompts_of(), Sampling(30), seeds=range(9))
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert plan.bytes_per_token == 2 * config.num_hidden_layers * heads * width * (2 if autocast else 4)
    assert plan.num_bytes == engine.slots.num_bytes == 3 * 70 * plan.bytes_per_token


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("num_sequences", [2.0, 2.9, 5.5, 100])
def test_the_cache_stays_within_its_budget_and_the_samples_stay_the_same(num_sequences, num_samples):
    model, prompts = model_of(), [prompt for prompt in prompts_of() for _ in range(num_samples)]
    free = engine_of(model, eos=())
    budget = int(num_sequences * 65 * free.bytes_per_token())
    engine, seeds = engine_of(model, eos=(), kv_budget=budget), range(len(prompts))
    plan = engine.cache_plan(prompts, Sampling(25))
    assert plan.num_bytes <= budget and plan.num_slots == min(int(num_sequences), len(prompts))
    for new in (5, 25, 12):  # also after other lengths
        samples = engine.generate(prompts, Sampling(new), seeds=seeds)
        assert engine.slots.num_bytes <= budget
    expected = free.generate(prompts, Sampling(12), seeds=seeds)
    assert [s.response for s in samples] == [s.response for s in expected]


def test_a_plan_reads_as_a_sentence():
    text = "KV cache: 64 slots x 1,024 tokens x 36,864 bytes = 2,304.0 MiB at most"
    assert str(CachePlan(64, 1024, 36864)) == text


def test_a_budget_that_holds_no_sequence_is_refused_before_any_is_read():
    engine = engine_of(model_of(), kv_budget=65 * 256 - 1)
    text = r"kv_budget is 0.0 MiB, but one sequence needs KV cache: 1 slots x 65 tokens x 256 bytes = 0.0 MiB at most"
    for call in (
        lambda: engine.cache_plan(prompts_of(), Sampling(25)),
        lambda: engine.stream(prompts_of(), Sampling(25), seeds=range(9)),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_memory_follows_the_longest_response_not_the_longest_allowed():
    model = model_of()
    engine = engine_of(model, eos=range(1, 100))
    samples = engine.generate(prompts_of((5, 9, 12)), Sampling(240), seeds=range(3))
    longest = max(len(s.prompt) + len(s.response) for s in samples)
    assert longest < 60
    assert engine.slots.num_bytes <= 3 * 2 * longest * engine.bytes_per_token()


def test_samples_stream_as_they_end_and_are_those_of_generate():
    model, prompts, limits = model_of(), prompts_of(), [3, 1, 14, 20, 2, 9, 1, 6, 20]
    engine, drawn = engine_of(model, eos=(), max_slots=9), []
    stream = engine.stream(prompts, Sampling(20), seeds=range(9), limits=limits, progress=drawn.append)
    order, samples = [], {}
    for number, sample in stream:
        order.append(number)
        samples[number] = sample
        assert len(drawn) == limits[number]  # at the step that ended it
    assert [limits[n] for n in order] == sorted(limits)
    assert [samples[n] for n in range(9)] == engine.generate(prompts, Sampling(20), seeds=range(9), limits=limits)


def test_a_stream_leaves_the_callers_gradients_on_and_restores_the_mode_when_closed():
    model, prompts = model_of(), prompts_of()
    model.train()
    engine = engine_of(model)
    stream = engine.stream(prompts, Sampling(9), seeds=range(9))
    assert model.training
    next(stream)
    assert torch.is_grad_enabled() and not model.training
    with pytest.raises(RuntimeError, match="another stream of this engine is open"):
        engine.generate(prompts, Sampling(3), seeds=range(9))
    stream.close()
    assert model.training
    assert len(engine.generate(prompts, Sampling(3), seeds=range(9))) == 9


def test_a_stream_names_bad_input_before_it_is_read():
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine_of(model_of()).stream([[]], Sampling(3), seeds=[0])


def test_an_engine_can_be_used_again_for_smaller_and_larger_batches():
    model, prompts = model_of(), prompts_of()
    engine = engine_of(model, max_slots=4)
    for chosen, sampling in ((prompts[:2], Sampling(3)), (prompts, Sampling(30)), (prompts[2:5], Sampling(8))):
        samples = engine.generate(chosen, sampling, seeds=range(len(chosen)))
        assert samples == engine_of(model, max_slots=4).generate(chosen, sampling, seeds=range(len(chosen)))
