"""The clipped surrogate: values at known ratios, where its gradient vanishes, and what micro-batches add up to."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf import ppo_policy_loss
from fastrlhf.ops.ppo_policy_loss import ppo_policy_loss_ref


def test_at_ratio_1_it_is_minus_the_mean_advantage_with_the_policy_gradient():
    logprobs, advantages = -torch.rand(50), torch.randn(50)
    leaf = logprobs.clone().requires_grad_()
    loss, stats = ppo_policy_loss(leaf, logprobs, advantages)
    loss.backward()
    torch.testing.assert_close(loss, -advantages.mean())
    torch.testing.assert_close(leaf.grad, -advantages / 50)
    expected = {"clip_fraction": 0.0, "approx_kl": 0.0, "ratio": 1.0, "ratio_max": 1.0, "ratio_min": 1.0}
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (1.5, 2.0, -2.4, 0.0),  # already likelier than allowed: no further push
        (0.5, 2.0, -1.0, -1.0),  # too unlikely: pushed back
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.1, 0.0, 0.0, 0.0),
    ],
)
def test_only_the_far_side_is_clipped(ratio, advantage, value, gradient):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, stats = ppo_policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]))
    loss.backward()
    assert loss.item() == pytest.approx(value) and logprobs.grad.item() == pytest.approx(gradient)
    assert stats["clip_fraction"].item() == float(gradient == 0 and advantage != 0)


def test_an_asymmetric_range_moves_one_bound():
    logprobs = torch.tensor([1.25, 0.75]).log()
    loss, stats = ppo_policy_loss(logprobs, torch.zeros(2), torch.tensor([1.0, -1.0]), clip_range=(0.2, 0.3))
    assert loss.item() == pytest.approx((-1.25 + 0.8) / 2) and stats["clip_fraction"] == 0.5


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (5.0, -2.0, 6.0, 0.0),  # far likelier though it was bad: the loss stops at 3 |A|
        (2.9, -2.0, 5.8, 5.8),
        (0.5, -2.0, 1.6, 0.0),
        (5.0, 2.0, -2.4, 0.0),
        (math.inf, -2.0, 6.0, 0.0),
    ],
)
def test_dual_clip_bounds_the_loss_of_bad_tokens(ratio, advantage, value, gradient):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, stats = ppo_policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), dual_clip=3.0)
    loss.backward()
    assert loss.item() == pytest.approx(value) and logprobs.grad.item() == pytest.approx(gradient)
    assert stats["clip_fraction"].item() == float(gradient == 0)


def test_approx_kl_estimates_kl_of_old_to_new():
    old, new = torch.randn(2, 8, dtype=torch.float64).log_softmax(-1)
    counts = (old.exp() * 1e5).round().long()  # as many tokens of each kind as the old policy would sample
    _, stats = ppo_policy_loss(*(x.repeat_interleave(counts) for x in (new, old, torch.zeros_like(old))))
    torch.testing.assert_close(stats["approx_kl"], (old.exp() * (old - new)).sum(), rtol=1e-3, atol=0)


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(0, 60))
@settings(max_examples=50, deadline=None)
def test_micro_batches_with_the_global_count_add_up(seed, size, cut):
    generator = torch.Generator().manual_seed(seed)
    logprobs, old, advantages = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(size, generator=generator) < 0.7
    count = max(int(mask.sum()), 1)
    whole, whole_stats = ppo_policy_loss(logprobs, old, advantages, mask)
    parts = [
        ppo_policy_loss(logprobs[s], old[s], advantages[s], mask[s], denominator=count)
        for s in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for name in ("clip_fraction", "approx_kl", "ratio"):
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], whole_stats[name])


def test_nan_outside_the_mask_does_not_leak_and_inside_is_shown():
    logprobs, old, advantages, mask = torch.randn(9), torch.randn(9), torch.randn(9), torch.rand(9) < 0.6
    mask[:2] = torch.tensor([True, False])
    clean, clean_stats = ppo_policy_loss(logprobs, old, advantages, mask)
    logprobs[1] = old[1] = advantages[1] = float("nan")
    leaf = logprobs.clone().requires_grad_()
    loss, stats = ppo_policy_loss(leaf, old, advantages, mask)
    loss.backward()
    assert torch.equal(loss, clean) and all(torch.equal(stats[name], clean_stats[name]) for name in stats)
    assert not leaf.grad[~mask].any()
    logprobs[0] = float("nan")
    loss, stats = ppo_policy_loss(logprobs, old, advantages, mask)
    assert loss.isnan() and all(stats[name].isnan() for name in ("approx_kl", "ratio", "ratio_max", "ratio_min"))


@pytest.mark.parametrize("size", [0, 5])
def test_nothing_to_count_gives_0_that_can_be_differentiated(size):
    logprobs = torch.randn(size, requires_grad=True)
    loss, stats = ppo_policy_loss(logprobs, torch.randn(size), torch.randn(size), torch.zeros(size, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not logprobs.grad.any() and not any(stats.values())


def test_an_overflowing_ratio_is_inf_only_where_it_counts():
    old, far = torch.zeros(1), torch.tensor([100.0])
    assert ppo_policy_loss(far, old, torch.ones(1))[0] == pytest.approx(-1.2)
    assert ppo_policy_loss(far, old, -torch.ones(1))[0] == math.inf


def test_half_precision_is_computed_in_float32():
    logprobs, old, advantages = torch.randn(3, 20).bfloat16()
    half, _ = ppo_policy_loss(logprobs, old, advantages)
    full, _ = ppo_policy_loss(logprobs.float(), old.float(), advantages.float())
    assert half.dtype == torch.float32 and torch.equal(half, full)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"advantages": torch.zeros(3)}, ValueError, "advantages (3,)"),
        ({"old_logprobs": torch.zeros(4).double()}, TypeError, "old_logprobs must be float32, got float64"),
        ({"mask": torch.ones(4)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask (3,)"),
        ({"advantages": torch.zeros(4, requires_grad=True)}, ValueError, "advantages gets no gradient"),
        ({"clip_range": -0.1}, ValueError, "got (-0.1, -0.1)"),
        ({"clip_range": (1.5, 0.2)}, ValueError, "got (1.5, 0.2)"),
        ({"clip_range": (0.1, 0.2, 0.3)}, ValueError, "got (0.1, 0.2, 0.3)"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip must be above 1 or None, got 1.0"),
        ({"ratio": "word"}, ValueError, "ratio must be 'token' or 'sequence', got 'word'"),
        ({"ratio": "sequence"}, ValueError, "got ratio='sequence' without it"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "got ratio='token' with it"),
        ({"ratio": "sequence", "cu_seqlens": torch.tensor([0, 3]).int()}, ValueError, "must rise from 0 to 4"),
        ({"ratio": "sequence", "cu_seqlens": torch.tensor([0, 4])}, TypeError, "cu_seqlens must be int32"),
        ({"denominator": 0}, ValueError, "denominator must be positive and finite, got 0"),
        ({"advantages": torch.zeros(4, device="meta")}, ValueError, "must be on one device"),
    ],
)
def test_bad_input_is_named(change, error, text):
    good = {name: torch.zeros(4) for name in ("logprobs", "old_logprobs", "advantages")}
    with pytest.raises(error) as caught:
        ppo_policy_loss(**{**good, **change})
    assert "ppo_policy_loss: " in str(caught.value) and text in str(caught.value)


def test_ratios_that_are_all_infinite_show_in_both_extremes():
    _, stats = ppo_policy_loss(torch.full((5,), 1000.0), torch.zeros(5), torch.ones(5))
    assert stats["ratio_max"] == stats["ratio_min"] == torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("log_ratio", [800.0, math.inf])
def test_advantage_0_gives_0_whatever_the_ratio(dtype, dual_clip, log_ratio):
    """Between tokens that do count; the reference's own gradient, by autograd, agrees."""
    advantages = torch.tensor([0.5, 0.0, -0.0, -0.5, 0.7], dtype=dtype)
    old = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0], dtype=dtype)
    new = torch.tensor([0.1, log_ratio, log_ratio, 0.05, log_ratio], dtype=dtype)
    kept = torch.tensor([True, False, False, True, True])
    results = []
    for op, select in ((ppo_policy_loss, slice(None)), (by_reference, slice(None)), (ppo_policy_loss, kept)):
        leaf = new.clone().requires_grad_()
        loss, _ = op(leaf[select], old[select], advantages[select], dual_clip=dual_clip, denominator=5)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for loss, grad in results:
        torch.testing.assert_close(loss, results[2][0])  # without the two tokens at all
        torch.testing.assert_close(grad, results[2][1])
    new[1] = math.nan
    assert ppo_policy_loss(new, old, advantages)[0].isnan()


def by_reference(*tensors, dual_clip, denominator):
    """The reference's loss, whose gradient autograd makes."""
    return ppo_policy_loss_ref(*tensors, None, 0.2, 0.2, dual_clip, denominator)[:2]
