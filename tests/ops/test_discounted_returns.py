"""Discounted returns against their definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf import discounted_returns, gae


def cu(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@given(st.lists(st.integers(0, 40), max_size=9), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_each_is_the_discounted_sum_of_what_follows_in_its_segment(lengths, gamma):
    rewards = torch.randn(sum(lengths), dtype=torch.float64)
    parts = []
    for part in rewards.split(lengths) if lengths else []:
        t = torch.arange(len(part))
        ahead = t[None] - t[:, None]
        parts.append(torch.where(ahead >= 0, gamma ** ahead.clamp(min=0).double(), 0) @ part)
    expected = torch.cat(parts) if parts else rewards
    actual = discounted_returns(rewards, cu(*lengths), gamma=gamma)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_without_discount_it_is_the_reward_to_go():
    rewards = torch.randn(50, dtype=torch.float64)
    torch.testing.assert_close(discounted_returns(rewards, cu(50)), rewards.flip(0).cumsum(0).flip(0))


def test_it_is_gae_without_values():
    rewards = torch.randn(3000)
    bounds = cu(1000, 7, 0, 1993)
    advantages, _ = gae(rewards, torch.zeros_like(rewards), bounds, gamma=0.99, lam=1.0)
    torch.testing.assert_close(discounted_returns(rewards, bounds, gamma=0.99), advantages, rtol=1e-6, atol=1e-5)


def test_nan_goes_towards_the_start_of_its_segment_only():
    rewards = torch.zeros(6)
    rewards[1] = float("nan")
    assert discounted_returns(rewards, cu(3, 3)).isnan().tolist() == [True, True, False, False, False, False]


def test_half_precision_is_computed_in_float32():
    rewards = torch.randn(9).bfloat16()
    assert torch.equal(discounted_returns(rewards, cu(9)), discounted_returns(rewards.float(), cu(9)))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rewards": torch.zeros(2, 2)}, ValueError, "rewards must be (T,) = (*,), got (2, 2)"),
        ({"rewards": torch.zeros(4, dtype=torch.int64)}, TypeError, "rewards must be float32, float64, got int64"),
        ({"rewards": torch.zeros(4, requires_grad=True)}, ValueError, "rewards gets no gradient"),
        ({"rewards": torch.zeros(4, device="meta")}, ValueError, "must be on one device"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, ValueError, "must rise from 0 to 4"),
        ({"cu_seqlens": torch.tensor([0, 4])}, TypeError, "cu_seqlens must be int32, got int64"),
        ({"gamma": -0.1}, ValueError, "gamma must be in [0, 1], got -0.1"),
        ({"gamma": float("nan")}, ValueError, "gamma must be in [0, 1], got nan"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error) as caught:
        discounted_returns(**{"rewards": torch.zeros(4), "cu_seqlens": cu(4), **change})
    assert "discounted_returns: " in str(caught.value) and text in str(caught.value)
