"""Sampling against the distribution, and transformers' own warpers."""

import pytest
import torch
from compare import filled
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fastrlhf import sample_tokens
from fastrlhf.ops.sample_tokens import sample_tokens_ref, uniforms

BACKENDS = {"native": torch.ops.fastrlhf.sample_tokens.default, "reference": sample_tokens_ref}
backends = pytest.mark.parametrize("backend", BACKENDS)


def draw(backend, row, num_draws, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Draws `num_draws` tokens from one row of logits, by seed 0, 1, ..."""
    logits = row.expand(num_draws, -1)
    seeds = torch.arange(num_draws)
    return BACKENDS[backend](logits, seeds, torch.zeros_like(seeds), temperature, top_k, top_p, min_p)


def test_uniforms_are_the_published_splitmix64_stream():
    # the first output of splitmix64 from state 0 is E220A8397B1DCDAF: the start of seed 0's own stream
    start = 0xE220A8397B1DCDAF
    expected = []
    for position in range(1, 4):
        z = (start + position * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        expected.append(((z ^ z >> 31) >> 11) / 2**53)
    assert uniforms(torch.zeros(3, dtype=torch.int64), torch.arange(3)).tolist() == expected


@backends
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_those_of_softmax(backend, temperature):
    num_draws, row = 40000, torch.randn(30)
    tokens, _, _ = draw(backend, row, num_draws, temperature=temperature)
    expected = (row.double() / temperature).softmax(0) * num_draws
    chi_square = ((tokens.bincount(minlength=30) - expected).square() / expected).sum()
    assert chi_square < 29 + 4 * (2 * 29) ** 0.5  # four standard deviations above the mean of 29 degrees of freedom


@pytest.mark.parametrize(("backend", "num_draws"), [("native", 20000), ("reference", 4000)])
def test_frequencies_hold_across_the_blocks_of_a_large_vocabulary(backend, num_draws):
    size = 9001  # the CPU's kernel widens its blocks above 8192
    row = torch.randn(size)
    tokens, _, _ = draw(backend, row, num_draws)
    probs = torch.stack([part.sum() for part in row.double().softmax(0).tensor_split(40)])
    counts = torch.stack([part.sum() for part in tokens.bincount(minlength=size).tensor_split(40)])
    chi_square = ((counts - probs * num_draws).square() / (probs * num_draws)).sum()
    assert chi_square < 39 + 4 * (2 * 39) ** 0.5


@backends
def test_successive_positions_are_independent(backend):
    row, num_draws = torch.zeros(4).expand(20000, -1), 20000
    args = 1.0, 0, 1.0, 0.0
    seeds, positions = torch.full((num_draws,), 7), torch.arange(num_draws)
    tokens = BACKENDS[backend](row, seeds, positions, *args)[0]
    pairs = (tokens[1:] * 4 + tokens[:-1]).bincount(minlength=16)
    expected = (num_draws - 1) / 16
    assert ((pairs - expected).square() / expected).sum() < 15 + 4 * (2 * 15) ** 0.5


@backends
@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"top_p": 0.01}, [TopPLogitsWarper(0.01)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"top_k": 12, "top_p": 0.9}, [TopKLogitsWarper(12), TopPLogitsWarper(0.9)]),
        ({"top_k": 100, "top_p": 0.9, "min_p": 0.2}, [TopPLogitsWarper(0.9), MinPLogitsWarper(0.2)]),
    ],
)
def test_truncation_keeps_what_transformers_keeps(backend, options, warpers):
    for row in filled(torch.randn(3, 40) * 1.5):
        warped = row[None] / 0.7
        for warper in warpers:
            warped = warper(None, warped)
        tokens, logprobs, sampler_logprobs = draw(backend, row, 4000, temperature=0.7, **options)
        kept = warped[0].isfinite()
        likely = kept & (warped[0].softmax(0) > 0.005)
        assert kept[tokens].all() and torch.isin(likely.nonzero()[:, 0], tokens).all()
        torch.testing.assert_close(sampler_logprobs, warped[0].log_softmax(0)[tokens])
        torch.testing.assert_close(logprobs, (row / 0.7).log_softmax(0)[tokens])


@backends
def test_ties_with_the_last_kept_token_are_kept(backend):
    row = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0, -0.0])
    for options, kept in (({"top_k": 2}, {1, 2, 3, 4}), ({"top_p": 0.5}, {1, 2, 3, 4}), ({"top_k": 5}, set(range(6)))):
        assert set(draw(backend, row, 24, **options)[0].tolist()) == kept


def test_top_k_and_top_p_of_one_token_are_argmax():
    logits = torch.randn(20, 999)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        tokens, _, sampler_logprobs = sample_tokens(logits, **options)
        assert torch.equal(tokens, logits.argmax(-1)) and not sampler_logprobs.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_logprobs_are_those_of_log_softmax(dtype):
    logits = (5 * torch.randn(64, 4099)).to(dtype)
    tokens, logprobs, sampler_logprobs = sample_tokens(logits, temperature=1.3)
    expected = (logits.double() / 1.3).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(logprobs, sampler_logprobs)


@backends
def test_a_draw_depends_on_its_row_seed_and_position_alone(backend):
    logits, seeds, positions = torch.randn(9, 2001), torch.arange(9) * 977 - 5000, torch.arange(9) % 7
    options = 1.0, 0, 0.9, 0.0
    together = BACKENDS[backend](logits, seeds, positions, *options)
    order = torch.randperm(9)
    shuffled = BACKENDS[backend](logits[order], seeds[order], positions[order], *options)
    for whole, part in zip(together, shuffled, strict=True):
        assert torch.equal(whole[order], part)
    for n in (0, 5, 8):
        alone = BACKENDS[backend](logits[n : n + 1], seeds[n : n + 1], positions[n : n + 1], *options)
        assert all(torch.equal(whole[n : n + 1], one) for whole, one in zip(together, alone, strict=True))
    assert not torch.equal(BACKENDS[backend](logits, seeds, positions + 1, *options)[0], together[0])
    assert not torch.equal(BACKENDS[backend](logits, seeds + 1, positions, *options)[0], together[0])


def test_the_kernel_draws_what_the_reference_draws():
    logits, seeds = 3 * torch.randn(500, 9001), torch.randint(-(2**63), 2**63 - 1, (500,))
    for options in [(1.0, 0, 1.0, 0.0), (0.7, 40, 0.9, 0.01)]:
        tokens = [BACKENDS[b](logits, seeds, torch.arange(500), *options)[0] for b in BACKENDS]
        assert torch.equal(*tokens)


def test_without_seeds_torch_draws_them():
    logits = torch.randn(8, 500)
    torch.manual_seed(3)
    first, second = sample_tokens(logits), sample_tokens(logits)
    torch.manual_seed(3)
    again = sample_tokens(logits)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], second[0])


def test_minus_infinity_is_never_drawn():
    logits = torch.full((300, 2500), -torch.inf)
    logits[:, ::100] = torch.randn(300, 25)
    tokens, logprobs, _ = sample_tokens(logits)
    assert not (tokens % 100).any() and logprobs.isfinite().all()


@backends
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_op_gives_nan_for_a_bad_row_and_only_there(backend, bad):
    logits = torch.randn(3, 50)
    logits[1, 7] = bad
    tokens, logprobs, sampler_logprobs = BACKENDS[backend](logits, *torch.zeros(2, 3).long(), 1.0, 0, 0.9, 0.0)
    assert logprobs.isnan().tolist() == sampler_logprobs.isnan().tolist() == [False, True, False]
    assert tokens[1] == 0


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits": torch.zeros(4)}, ValueError, "logits must be (N, V)"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "at least one column, got (2, 0)"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logits must be float32"),
        ({"logits": torch.full((2, 3), torch.nan)}, ValueError, "row 0 of logits holds NaN or inf"),
        ({"logits": torch.full((2, 3), -torch.inf)}, ValueError, "nothing but -inf"),
        ({"temperature": 0.0}, ValueError, "for the most likely token use argmax"),
        ({"temperature": -1.0}, ValueError, "temperature must be above 0 and finite, got -1.0"),
        ({"top_p": 0.0}, ValueError, "top_p=0.0"),
        ({"top_k": -1}, ValueError, "top_k=-1"),
        ({"min_p": 1.5}, ValueError, "min_p=1.5"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, ValueError, "seeds must be (N,) = (2,), got (3,)"),
        ({"seeds": torch.zeros(2)}, TypeError, "seeds must be int64, got float32"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, TypeError, "positions must be int64, got int32"),
        ({"positions": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "must be on one device"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error) as caught:
        sample_tokens(**{"logits": torch.zeros(2, 3), **change})
    assert "sample_tokens: " in str(caught.value) and text in str(caught.value)
