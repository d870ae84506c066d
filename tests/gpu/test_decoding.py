"""Decode steps from CUDA graphs are those of the model."""

import pytest
import torch
from engines import assert_same_samples, engine_of, generate, model_of, teacher_forced


@pytest.mark.parametrize("num_samples", [1, 3])
def test_graphs_draw_what_plain_steps_draw(num_samples):
    model = model_of().to("cuda")
    engine = engine_of(model, max_slots=6)
    expected = generate(engine_of(model, max_slots=6, cuda_graphs=False), num_samples)
    for _ in range(2):
        assert_same_samples(generate(engine, num_samples), expected)
    assert sorted(engine._graphs.captured) == [1, 2, 4, 6] and not engine._graphs.broken
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    assert_same_samples(generate(engine), generate(engine_of(model, max_slots=6, cuda_graphs=False)))


def test_graphs_under_autocast_have_the_models_logprobs():
    model = model_of().to("cuda")
    engine = engine_of(model, max_slots=6)
    for scale in (1.0, 0.5):  # of new weights, of which autocast makes new copies
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        with torch.autocast("cuda", torch.bfloat16):
            samples = generate(engine)
            for sample in samples:
                expected = teacher_forced(model, sample).float()
                torch.testing.assert_close(torch.tensor(sample.logprobs), expected, rtol=0, atol=0.15)
    assert not engine._graphs.broken
