"""Generation against transformers' own, and against the model run on the finished text."""

import pytest
import torch
from compare import filled
from engines import EOS, assert_teacher_forced, engine_of, model_of, prompts_of, teacher_forced
from tiny import ARCHITECTURES

from fastrlhf.generation.engine import Engine, Sample, Sampling


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_is_what_transformers_generates(arch):
    model, prompts = model_of(arch), prompts_of()
    model.set_attn_implementation("eager")
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": EOS, "pad_token_id": 0}
        expected.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    samples = engine_of(model, max_slots=4).generate(prompts, Sampling(20, greedy=True), seeds=range(len(prompts)))
    assert [s.response for s in samples] == expected
    for sample in samples:
        assert_teacher_forced(model, sample)
        assert not any(sample.sampler_logprobs)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logprobs_are_those_of_a_teacher_forced_pass(arch):
    model, prompts = model_of(arch), prompts_of()
    samples = engine_of(model).generate(prompts, Sampling(30, temperature=0.7), seeds=range(len(prompts)))
    for sample in filled(samples):
        assert_teacher_forced(model, sample, temperature=0.7)
        assert sample.logprobs == sample.sampler_logprobs


def test_logits_pass_through_the_models_own_head():
    model = model_of("gemma3_text", final_logit_softcapping=3.0)
    for sample in filled(engine_of(model).generate(prompts_of(), Sampling(10), seeds=range(9))):
        assert_teacher_forced(model, sample)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3_text"])
def test_it_runs_under_the_callers_autocast(arch):
    model = model_of(arch)
    engine = engine_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        samples = engine.generate(prompts_of(), Sampling(8), seeds=range(9))
        for sample in filled(samples):
            expected = teacher_forced(model, sample).float()
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, rtol=0, atol=0.15)


@pytest.mark.parametrize("max_slots", [1, 2, 5])
def test_responses_do_not_depend_on_the_number_of_slots_or_the_order(max_slots):
    model, prompts, seeds = model_of(), prompts_of(), [100 * i for i in range(9)]
    whole = engine_of(model, max_slots=64).generate(prompts, Sampling(25), seeds=seeds)
    order = [4, 8, 0, 1, 7, 3, 2, 6, 5]
    some = engine_of(model, max_slots=max_slots).generate(
        [prompts[i] for i in order], Sampling(25), seeds=[seeds[i] for i in order]
    )
    for i, sample in zip(order, some, strict=True):
        assert sample.prompt == prompts[i] and sample.response == whole[i].response
        torch.testing.assert_close(torch.tensor(sample.logprobs), torch.tensor(whole[i].logprobs), rtol=0, atol=1e-5)


def tokens_read(model, run):
    """What `run` gives, and how many tokens passed the model meanwhile."""
    counts = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        return run(), sum(counts)
    finally:
        hook.remove()


@pytest.mark.parametrize("max_slots", [1, 3, 6, 64])
def test_a_repeated_prompt_passes_the_model_once_and_changes_no_sample(max_slots):
    model, prompts, seeds = model_of(), prompts_of(), range(36)
    engine = engine_of(model, max_slots=max_slots)
    alone = [engine.generate(prompts, Sampling(12), seeds=seeds[n::4]) for n in range(4)]
    repeated = [prompt for prompt in prompts for _ in range(4)]
    samples, num_read = tokens_read(model, lambda: engine.generate(repeated, Sampling(12), seeds=seeds))
    assert num_read == sum(map(len, prompts)) + sum(len(s.response) - 1 for s in samples)
    for i, sample in enumerate(samples):
        expected = alone[i % 4][i // 4]
        assert (sample.prompt, sample.response, sample.finished) == (
            expected.prompt,
            expected.response,
            expected.finished,
        )
        torch.testing.assert_close(torch.tensor(sample.logprobs), torch.tensor(expected.logprobs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_slots", [7, 64])
def test_a_prompt_longer_than_a_pass_is_read_once_for_its_samples(max_slots, monkeypatch):
    monkeypatch.setattr("fastrlhf.generation.decoding.PREFILL_TOKENS", 30)
    model, prompts = model_of(), prompts_of()
    repeated = [prompt for prompt in prompts for _ in range(3)]
    engine = engine_of(model, max_slots=max_slots)
    samples, num_read = tokens_read(model, lambda: engine.generate(repeated, Sampling(9), seeds=range(27)))
    assert num_read == sum(map(len, prompts)) + sum(len(s.response) - 1 for s in samples)
    for sample in samples:
        assert_teacher_forced(model, sample)


def test_two_slots_serve_nine_prompts_of_mixed_lengths():
    model, prompts, limits = model_of(), prompts_of(), [3, 1, 14, 20, 2, 9, 1, 6, 20]
    drawn = []
    engine = engine_of(model, eos=(), max_slots=2)
    samples = engine.generate(prompts, Sampling(20), seeds=range(9), limits=limits, progress=drawn.append)
    assert [len(s.response) for s in samples] == limits and not any(s.finished for s in samples)
    assert sum(drawn) == sum(limits) and max(drawn) == 2
    for sample in samples:
        assert_teacher_forced(model, sample)


def test_eos_ends_a_response_and_is_part_of_it():
    model = model_of()
    eos = set(range(1, 40))
    samples = engine_of(model, eos=eos, max_slots=3).generate(prompts_of(), Sampling(8), seeds=range(9))
    assert {s.finished for s in samples} == {True, False}
    for sample in samples:
        assert not eos & set(sample.response[:-1])
        assert sample.finished == (sample.response[-1] in eos) and (sample.finished or len(sample.response) == 8)


def test_min_new_tokens_holds_eos_back_and_keeps_the_models_logprobs():
    model, eos = model_of(), set(range(1, 150))
    sampling = Sampling(12, min_new_tokens=5)
    for sample in filled(engine_of(model, eos=eos).generate(prompts_of(), sampling, seeds=range(9))):
        assert not eos & set(sample.response[:5])
        assert_teacher_forced(model, sample)
        held = range(min(5, len(sample.response)))
        assert all(sample.sampler_logprobs[i] > sample.logprobs[i] for i in filled(held))
        assert sample.sampler_logprobs[5:] == pytest.approx(sample.logprobs[5:], abs=1e-5)


def test_truncation_changes_the_samplers_logprobs_alone():
    model = model_of()
    for sample in filled(engine_of(model).generate(prompts_of(), Sampling(10, top_k=3), seeds=range(9))):
        assert_teacher_forced(model, sample)
        assert all(s >= p for s, p in filled(zip(sample.sampler_logprobs, sample.logprobs, strict=True)))
        assert all(s > -10 for s in filled(sample.sampler_logprobs))


def test_the_seed_decides_the_response():
    model, prompt = model_of(), prompts_of((6,))
    samples = engine_of(model).generate(prompt * 4, Sampling(12), seeds=[5, 5, 6, -(2**63)])
    assert samples[0] == samples[1] and len({tuple(s.response) for s in samples}) == 3


def test_a_first_token_follows_the_models_distribution():
    model, prompt = model_of(vocab=8), [[2, 3, 4]]
    samples = engine_of(model, eos=()).generate(prompt * 4000, Sampling(1), seeds=range(4000))
    with torch.no_grad():
        expected = 4000 * model_probs(model, prompt)
    counts = torch.tensor([s.response[0] for s in samples]).bincount(minlength=8)
    likely = expected > 5
    chi_square = ((counts - expected).square() / expected)[likely].sum()
    assert chi_square < 7 + 4 * (2 * 7) ** 0.5


def model_probs(model, prompt):
    model.set_attn_implementation("eager")
    return model(torch.tensor(prompt)).logits[0, -1].softmax(-1)


def test_new_weights_are_used_at_once():
    model, prompts = model_of(), prompts_of()
    engine = engine_of(model)
    engine.generate(prompts, Sampling(5), seeds=range(9))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    for sample in filled(engine.generate(prompts, Sampling(5), seeds=range(9))):
        assert_teacher_forced(model, sample)


def test_the_training_mode_of_every_module_is_restored():
    model = model_of()
    model.train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    engine = engine_of(model)
    engine.generate(prompts_of(), Sampling(3), seeds=range(9))
    assert [m.training for m in model.modules()] == before
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        engine.generate(prompts_of(), Sampling(3), seeds=range(9))
    assert [m.training for m in model.modules()] == before
    assert torch.is_grad_enabled()


def test_no_prompts_give_no_samples():
    assert engine_of(model_of()).generate([], Sampling(3), seeds=[]) == []


def test_a_response_may_fill_the_context_exactly():
    model = model_of()
    samples = engine_of(model, eos=()).generate(prompts_of((250,)), Sampling(6), seeds=[0])
    assert len(samples[0].response) == 6
    assert_teacher_forced(model, samples[0])
    assert isinstance(samples[0], Sample)


@pytest.mark.parametrize(
    ("prompts", "options", "text"),
    [
        ([[2] * 250], {"sampling": Sampling(7)}, "250 prompt tokens and 7 new ones, but the model's context is 256"),
        ([[2], []], {"seeds": [0, 1]}, "prompt 1 is empty"),
        ([[2, 300]], {}, "tokens must be in [0, 300), prompt 0 has 2 to 300"),
        ([[2]], {"seeds": [1, 2]}, "seeds must be one a prompt, 1 in all, got 2"),
        ([[2]], {"limits": [9]}, "limits must be from 1 to max_new_tokens=4, got 9 for prompt 0"),
        ([[2]], {"seeds": [2**63]}, "seeds must fit 64 bits, got 9223372036854775808 for prompt 0"),
    ],
)
def test_bad_input_is_named_before_any_work(prompts, options, text):
    model = model_of()
    model.forward = None
    with pytest.raises(ValueError) as caught:
        engine_of(model).generate(prompts, **{"sampling": Sampling(4), "seeds": [0], **options})
    assert "Engine: " in str(caught.value) and text in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, "got 0.0; for the most likely token set greedy"),
        ({"temperature": float("inf")}, "got inf"),
        ({"min_new_tokens": 6}, "min_new_tokens must be from 0 to max_new_tokens=5, got 6"),
        ({"top_p": 1.1}, "top_p in (0, 1]"),
    ],
)
def test_bad_sampling_is_named(options, text):
    with pytest.raises(ValueError) as caught:
        Sampling(**{"max_new_tokens": 5, **options})
    assert "Sampling: " in str(caught.value) and text in str(caught.value)


def test_attention_softcapping_is_refused():
    model = model_of("gemma2", head_dim=8, num_key_value_heads=2)
    with pytest.raises(ValueError, match="softcap must be None while generating, got 50"):
        engine_of(model).generate(prompts_of(), Sampling(3), seeds=range(9))


def test_a_model_on_another_attention_is_refused():
    with pytest.raises(ValueError, match="must be on attention 'fastrlhf'"):
        Engine(model_of(), eos_token_ids=[1])
    model = model_of()
    with pytest.raises(ValueError, match="max_slots must be at least 1, got 0"):
        engine_of(model, max_slots=0)
