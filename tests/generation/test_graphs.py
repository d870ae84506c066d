"""Decode steps from graphs: what surrounds them, with a stand-in that calls the step again (graphs: tests/gpu)."""

import pytest
import torch
from engines import LIMITS, assert_same_samples, engine_of, generate, model_of, prompts_of

from fastrlhf.generation.engine import Sampling
from fastrlhf.generation.graphs import Graphs, padded_size


class StandIn:
    """Records as a graph does: shapes, and the tensors it reads and writes, are those of the recording."""

    def __init__(self):
        self.recorded, self.num_replayed = [], 0

    def __call__(self, function):
        result = function()
        self.recorded.append(len(result))

        def replay():
            self.num_replayed += 1
            result.copy_(function())

        return replay, result


@pytest.fixture
def stand_in(monkeypatch):
    made = StandIn()
    monkeypatch.setattr("fastrlhf.generation.engine.recorder", lambda device: made)
    return made


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("max_slots", [1, 3, 6, 64])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_rows_that_join_and_leave_padded_batches_draw_the_same_tokens(arch, max_slots, num_samples, stand_in):
    model = model_of(arch)
    expected = generate(engine_of(model, max_slots=max_slots, cuda_graphs=False), num_samples)
    assert not stand_in.recorded
    samples = generate(engine_of(model, max_slots=max_slots), num_samples)
    assert_same_samples(samples, expected)
    num_slots = min(max_slots, 9 * num_samples)
    assert set(stand_in.recorded) <= {padded_size(n, num_slots) for n in range(1, num_slots + 1)}
    assert stand_in.num_replayed >= max(LIMITS) - 1


def test_sizes_are_powers_of_two_up_to_the_slots():
    assert [padded_size(n, 6) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    assert [padded_size(n, 8) for n in (1, 3, 5, 8)] == [1, 4, 8, 8]


def test_a_size_is_recorded_once_while_neither_cache_nor_weights_move(stand_in):
    model = model_of()
    engine = engine_of(model, eos=(), max_slots=4)
    first = generate(engine)
    stand_in.recorded.clear()
    assert generate(engine) == first and not stand_in.recorded
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)  # as an optimizer does: graphs read new values at the old address
    assert_same_samples(generate(engine), generate(engine_of(model, eos=(), max_slots=4, cuda_graphs=False)))
    assert not stand_in.recorded
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    generate(engine)
    assert sorted(stand_in.recorded) == sorted(set(stand_in.recorded)) == [1, 2, 4]


def test_every_size_is_recorded_again_when_the_cache_grows(stand_in):
    engine = engine_of(model_of(), eos=())
    engine.generate([[5, 6]] * 2, Sampling(60), seeds=range(2))
    assert stand_in.recorded == [2] * 5  # caches of 4, 8, 16, 32 and, the longest that may come, 62 tokens


def test_under_autocast_graphs_live_as_long_as_its_copies_of_the_weights(stand_in):
    engine = engine_of(model_of())
    plain = engine_of(engine.model, cuda_graphs=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_samples(generate(engine), generate(plain))
        assert stand_in.recorded and not engine._graphs.captured
        stand_in.recorded.clear()
        assert len(list(engine.stream(prompts_of(), Sampling(5), seeds=range(9)))) == 9
        assert not stand_in.recorded  # its reader may leave the autocast between two samples


def fails(function):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def differs(function):
    result = function() + 1
    return (lambda: None), result


@pytest.mark.parametrize(("record", "why"), [(fails, "not permitted when stream"), (differs, "gives other logits")])
def test_a_model_that_graphs_do_not_hold_is_decoded_without_them(record, why, monkeypatch):
    model = model_of()
    expected = generate(engine_of(model))
    monkeypatch.setattr("fastrlhf.generation.engine.recorder", lambda device: record)
    engine = engine_of(model)
    with pytest.warns(UserWarning, match=f"no CUDA graphs of this model, which makes decoding slower: .*{why}"):
        assert generate(engine) == expected
    assert generate(engine) == expected  # and says so once


def test_what_pads_a_batch_does_not_reach_the_rows():
    seen = []

    def forward(inputs):
        seen.append(inputs.tolist())
        return inputs.float().T

    graphs = Graphs(forward, StandIn(), max_rows=8, device=torch.device("cpu"))
    logits = graphs(torch.tensor([[7, 8, 9], [3, 2, 1]]), num_slots=8, addresses=0)
    assert logits.tolist() == [[7, 3], [8, 2], [9, 1]]
    assert seen[-1] == [[7, 8, 9, 0], [3, 2, 1, 0]]
