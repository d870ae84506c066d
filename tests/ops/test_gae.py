"""GAE against closed forms."""

import itertools

import pytest
import torch
from compare import filled

from fastrlhf import gae


def cu(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def test_one_token_is_its_td_error():
    advantages, returns = gae(torch.tensor([2.0]), torch.tensor([0.5]), cu(1))
    assert advantages.tolist() == [1.5] and returns.tolist() == [2.0]


def test_lam_one_is_the_discounted_sum_of_rewards():
    rewards, values = torch.randn(40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    _, returns = gae(rewards, values, cu(25, 15), gamma=0.9, lam=1.0)
    for start, end in ((0, 25), (25, 40)):
        for t in filled(range(start, end)):
            discounts = 0.9 ** torch.arange(end - t, dtype=torch.float64)
            torch.testing.assert_close(returns[t], (discounts * rewards[t:end]).sum())


def test_lam_zero_is_the_td_error():
    rewards, values, last = torch.randn(9), torch.randn(9), torch.randn(1)
    advantages, _ = gae(rewards, values, cu(9), bootstrap=last, gamma=0.9, lam=0.0)
    torch.testing.assert_close(advantages, rewards + 0.9 * torch.cat([values[1:], last]) - values)


def test_masked_tokens_are_as_if_cut_out():
    rewards, values = torch.randn(30), torch.randn(30)
    mask = torch.rand(30) < 0.6
    lengths = [int(mask[:18].sum()), int(mask[18:].sum())]
    advantages, returns = gae(rewards, values, cu(18, 12), mask=mask)
    kept = gae(rewards[mask], values[mask], cu(*lengths))
    torch.testing.assert_close((advantages[mask], returns[mask]), kept, rtol=1e-6, atol=1e-6)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_a_zeroed_gap_is_a_run_of_tokens_of_reward_and_value_0():
    rewards, values, last = torch.randn(30), torch.randn(30), torch.randn(2)
    mask = torch.rand(30) < 0.6
    options = {"bootstrap": last, "gamma": 0.9, "lam": 0.8}
    advantages, returns = gae(rewards, values, cu(18, 12), mask=mask, gaps="zero", **options)
    plain = gae(rewards * mask, values * mask, cu(18, 12), **options)
    torch.testing.assert_close(advantages, plain[0] * mask, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(returns, plain[1] * mask, rtol=1e-6, atol=1e-6)


def test_padded_rows_are_segments_of_equal_length():
    rewards, values = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    cu_seqlens = torch.arange(0, 4 * 7 + 1, 7, dtype=torch.int32)
    inside = torch.arange(7) < torch.tensor([7, 1, 3, 5])[:, None]
    advantages, _ = gae(rewards.flatten(), values.flatten(), cu_seqlens, mask=inside.flatten())
    alone, _ = gae(rewards[2, :3], values[2, :3], cu(3))
    torch.testing.assert_close(advantages.view(4, 7)[2, :3], alone)
    assert not advantages.view(4, 7)[~inside].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    rewards, values = torch.randn(9).to(dtype), torch.randn(9).to(dtype)
    advantages, returns = gae(rewards, values, cu(4, 5))
    expected = gae(rewards.float(), values.float(), cu(4, 5))
    assert torch.equal(advantages, expected[0]) and torch.equal(returns, expected[1])


@pytest.mark.parametrize("masked", [False, True])
def test_segments_scanned_together_are_as_if_alone(masked):
    lengths = [1000, 1, 0, 1700, 999, 3, *[1200] * 30]
    rewards, values, last = torch.randn(sum(lengths)), torch.randn(sum(lengths)), torch.randn(len(lengths))
    mask = torch.rand(sum(lengths)) < 0.8 if masked else None
    together = gae(rewards, values, cu(*lengths), mask=mask, bootstrap=last)
    bounds = cu(*lengths).tolist()
    for n, (start, end) in filled(enumerate(itertools.pairwise(bounds))):
        part = slice(start, end)
        own_mask = None if mask is None else mask[part]
        alone = gae(rewards[part], values[part], cu(end - start), mask=own_mask, bootstrap=last[n : n + 1])
        assert all(torch.equal(a[part], b) for a, b in filled(zip(together, alone, strict=True))), n


def test_nan_stays_in_its_segment():
    rewards = torch.zeros(6)
    rewards[1] = float("nan")
    advantages, _ = gae(rewards, torch.zeros(6), cu(3, 3))
    assert advantages.isnan().tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"values": torch.zeros(5)}, ValueError, "rewards (4,) and values (5,)"),
        ({"rewards": torch.zeros(4, dtype=torch.int64)}, TypeError, "rewards must be float32, float64, got int64"),
        ({"values": torch.zeros(4).double()}, TypeError, "values must be float32, got float64"),
        ({"cu_seqlens": torch.tensor([0, 2, 1, 4], dtype=torch.int32)}, ValueError, "must rise from 0 to 4"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, ValueError, "must rise from 0 to 4"),
        ({"cu_seqlens": torch.tensor([0, 4])}, TypeError, "cu_seqlens must be int32, got int64"),
        ({"mask": torch.ones(4)}, TypeError, "mask must be bool"),
        ({"bootstrap": torch.zeros(2)}, ValueError, "bootstrap must be (N,) = (1,), got (2,)"),
        ({"values": torch.zeros(4, device="meta")}, ValueError, "must be on one device"),
        ({"gamma": 1.5}, ValueError, "gamma=1.5"),
        ({"gaps": "skip"}, ValueError, "gaps must be one of carry, zero, got 'skip'"),
    ],
)
def test_bad_input_is_named(change, error, text):
    good = {"rewards": torch.zeros(4), "values": torch.zeros(4), "cu_seqlens": cu(4)}
    with pytest.raises(error) as caught:
        gae(**{**good, **change})
    assert "gae: " in str(caught.value) and text in str(caught.value)
