"""The surrogate with a ratio a sequence: against Python's own arithmetic, and where it meets the ratio of a token."""

import itertools
import math

import pytest
import torch

from fastrlhf import ppo_policy_loss

LENGTHS = (3, 0, 1, 7)
CU_SEQLENS = torch.tensor([0, 3, 3, 4, 11], dtype=torch.int32)


def inputs(seed=0, dtype=torch.float64, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    old, step, advantages = (torch.randn(sum(LENGTHS), generator=generator, dtype=dtype) for _ in range(3))
    return old + spread * step, old, advantages, torch.rand(sum(LENGTHS), generator=generator) < 0.7


def sequence_loss(logprobs, old, advantages, mask=None, **options):
    options = {"cu_seqlens": CU_SEQLENS, **options}
    return ppo_policy_loss(logprobs, old, advantages, mask, ratio="sequence", **options)


def by_hand(logprobs, old, advantages, mask, low, high, dual):
    """The mean over sequences of the mean over their tokens, in Python floats."""
    losses, held, ratios = [], [], []
    for start, end in itertools.pairwise(CU_SEQLENS.tolist()):
        counting = [t for t in range(start, end) if mask[t]]
        if not counting:
            continue
        ratio = math.exp(math.fsum((logprobs[t] - old[t]).item() for t in counting) / len(counting))
        terms, holds = [], []
        for advantage in (advantages[t].item() for t in counting):
            bounded = min(max(ratio, 1 - low), 1 + high)
            term = max(-advantage * ratio, -advantage * bounded)
            limited = min(term, -advantage * dual) if advantage < 0 else term
            terms.append(limited)
            holds.append(limited != -advantage * ratio)
        losses.append(sum(terms) / len(terms))
        held.append(sum(holds) / len(holds))
        ratios.append(ratio)
    return [sum(x) / len(x) for x in (losses, held, ratios)] + [max(ratios), min(ratios)]


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_mean_over_sequences_of_the_mean_over_their_tokens(seed):
    logprobs, old, advantages, mask = inputs(seed, spread=1.0)
    mask[seed % 11] = True
    loss, stats = sequence_loss(logprobs, old, advantages, mask, clip_range=(0.1, 0.2), dual_clip=1.5)
    expected = by_hand(logprobs, old, advantages, mask, 0.1, 0.2, 1.5)
    actual = [loss, *(stats[name] for name in ("clip_fraction", "ratio", "ratio_max", "ratio_min"))]
    assert [x.item() for x in actual] == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_one_token_a_sequence_is_the_ratio_of_a_token():
    logprobs, old, advantages, mask = inputs(dtype=torch.float32)
    leaf, other = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    cu_seqlens = torch.arange(logprobs.shape[0] + 1, dtype=torch.int32)
    loss, stats = sequence_loss(leaf, old, advantages, mask, cu_seqlens=cu_seqlens, dual_clip=1.1)
    token_loss, token_stats = ppo_policy_loss(other, old, advantages, mask, dual_clip=1.1)
    (loss + token_loss).backward()
    torch.testing.assert_close((loss, stats, leaf.grad), (token_loss, token_stats, other.grad))


def test_the_tokens_of_a_sequence_share_one_gradient():
    logprobs, old, advantages, _ = inputs()
    mask = torch.tensor([True, False, True, True, *[False] * 7])
    leaf = logprobs.requires_grad_()
    loss, _ = sequence_loss(leaf, old, advantages, mask, clip_range=(1.0, 100.0))
    loss.backward()
    assert leaf.grad[0] == leaf.grad[2] != 0 and leaf.grad[3] != 0 and not leaf.grad[~mask].any()


def test_micro_batches_with_the_number_of_sequences_add_up():
    logprobs, old, advantages, mask = inputs()
    mask[:4] = True
    whole, whole_stats = sequence_loss(logprobs, old, advantages, mask, denominator=3)
    first = sequence_loss(logprobs[:4], old[:4], advantages[:4], mask[:4], cu_seqlens=CU_SEQLENS[:4], denominator=3)
    rest, cu_rest = slice(4, None), torch.tensor([0, 7], dtype=torch.int32)
    second = sequence_loss(logprobs[rest], old[rest], advantages[rest], mask[rest], cu_seqlens=cu_rest, denominator=3)
    torch.testing.assert_close(first[0] + second[0], whole)
    for name in ("clip_fraction", "approx_kl", "ratio"):
        torch.testing.assert_close(first[1][name] + second[1][name], whole_stats[name])


def test_nan_outside_the_mask_does_not_leak_and_inside_is_shown():
    logprobs, old, advantages, mask = inputs()
    mask[4:] = torch.tensor([True, False, True, True, False, True, True])
    clean = sequence_loss(logprobs, old, advantages, mask)
    logprobs[5] = old[5] = advantages[5] = torch.nan
    leaf = logprobs.clone().requires_grad_()
    shown = sequence_loss(leaf, old, advantages, mask)
    shown[0].backward()
    torch.testing.assert_close(shown, clean, rtol=0, atol=0)
    assert leaf.grad.isfinite().all() and leaf.grad[5] == 0
    logprobs[6] = torch.nan
    loss, stats = sequence_loss(logprobs, old, advantages, mask)
    assert loss.isnan() and all(stats[name].isnan() for name in ("approx_kl", "ratio", "ratio_max", "ratio_min"))


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0], [0, 5], [0, 2, 2, 5]])
def test_nothing_to_count_gives_0_that_can_be_differentiated(cu_seqlens):
    leaf = torch.randn(cu_seqlens[-1], requires_grad=True)
    mask, cu_seqlens = torch.zeros(leaf.shape, dtype=torch.bool), torch.tensor(cu_seqlens, dtype=torch.int32)
    loss, stats = sequence_loss(leaf, torch.randn_like(leaf), torch.randn_like(leaf), mask, cu_seqlens=cu_seqlens)
    loss.backward()
    assert loss == 0 and not leaf.grad.any() and not any(stats.values())


def test_an_infinite_ratio_is_held_where_the_advantage_is_positive_and_shown():
    leaf, old = torch.full((11,), 1000.0, requires_grad=True), torch.zeros(11)
    loss, stats = sequence_loss(leaf, old, torch.ones(11))
    loss.backward()
    assert loss.item() == pytest.approx(-1.2) and stats["clip_fraction"] == 1 and not leaf.grad.any()
    assert stats["ratio"] == stats["ratio_max"] == stats["ratio_min"] == torch.inf
    assert sequence_loss(leaf.detach(), old, -torch.ones(11))[0] == torch.inf


def test_the_result_does_not_depend_on_the_number_of_threads(one_thread):
    lengths = torch.randint(0, 900, (300,))
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    logprobs, old, advantages = (torch.randn(int(cu_seqlens[-1])) for _ in range(3))
    alone = sequence_loss(logprobs, old, advantages, cu_seqlens=cu_seqlens)
    torch.set_num_threads(2)
    torch.testing.assert_close(sequence_loss(logprobs, old, advantages, cu_seqlens=cu_seqlens), alone, rtol=0, atol=0)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_advantage_0_gives_0_whatever_the_ratio_of_its_sequence(dual_clip):
    """A sequence of such tokens alone, and tokens of advantage 0 beside one that is held."""
    old, new, advantages = torch.zeros(11), torch.zeros(11), torch.zeros(11)
    new[:3] = new[4:] = 800.0
    advantages[4], advantages[3] = 0.7, -0.5
    leaf = new.clone().requires_grad_()
    loss, _ = sequence_loss(leaf, old, advantages, dual_clip=dual_clip)
    loss.backward()
    assert loss.item() == pytest.approx((-1.2 * 0.7 / 7 + 0.5) / 3)
    assert leaf.grad.tolist() == pytest.approx([0, 0, 0, 0.5 / 3, *[0] * 7])
    new[5] = math.nan
    assert sequence_loss(new, old, advantages, dual_clip=dual_clip)[0].isnan()
