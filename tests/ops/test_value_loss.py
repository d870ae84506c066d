"""The clipped value error: plain squared error inside the range, no reward for running away from the old value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf import value_loss


@pytest.mark.parametrize("clip_range", [None, 100.0])
def test_within_the_range_it_is_half_the_mean_squared_error(clip_range):
    values, returns = torch.randn(30, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    leaf = values.clone().requires_grad_()
    loss, stats = value_loss(leaf, torch.zeros_like(values), returns, clip_range=clip_range)
    loss.backward()
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(values, returns) / 2)
    torch.testing.assert_close(stats["error"], torch.nn.functional.mse_loss(values, returns))
    torch.testing.assert_close(leaf.grad, (values - returns) / 30)
    assert stats["clip_fraction"] == 0


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (1.0, 0.0, 2.0, 0.5 * 1.8**2, 0.0),  # moved towards the return further than allowed
        (1.0, 0.0, -1.0, 0.5 * 2.0**2, 2.0),  # moved away: the plain error is the larger
        (-1.0, 0.0, -2.0, 0.5 * 1.8**2, 0.0),
        (0.1, 0.0, 1.0, 0.5 * 0.9**2, -0.9),
    ],
)
def test_a_value_gains_nothing_beyond_the_range(value, old, target, loss, gradient):
    leaf = torch.tensor([value], requires_grad=True)
    actual, stats = value_loss(leaf, torch.tensor([old]), torch.tensor([target]), clip_range=0.2)
    actual.backward()
    assert actual.item() == pytest.approx(loss) and leaf.grad.item() == pytest.approx(gradient)
    assert stats["clip_fraction"] == float(gradient == 0)


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(0, 60))
@settings(max_examples=50, deadline=None)
def test_micro_batches_with_the_global_count_add_up(seed, size, cut):
    generator = torch.Generator().manual_seed(seed)
    values, old, returns = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(size, generator=generator) < 0.7
    count = max(int(mask.sum()), 1)
    whole, whole_stats = value_loss(values, old, returns, mask)
    parts = [
        value_loss(values[s], old[s], returns[s], mask[s], denominator=count) for s in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for name in whole_stats:
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], whole_stats[name])


def test_nan_outside_the_mask_does_not_leak():
    values, old, returns, mask = torch.randn(9), torch.randn(9), torch.randn(9), torch.rand(9) < 0.6
    mask[1] = False
    clean, _ = value_loss(values, old, returns, mask)
    values[1] = old[1] = returns[1] = float("nan")
    leaf = values.clone().requires_grad_()
    loss, stats = value_loss(leaf, old, returns, mask)
    loss.backward()
    assert torch.equal(loss, clean) and not leaf.grad[~mask].any() and stats["error"].isfinite()


@pytest.mark.parametrize("name", ["values", "old_values", "returns"])
def test_nan_inside_the_mask_is_shown(name):
    tensors = {n: torch.randn(9) for n in ("values", "old_values", "returns")}
    tensors[name][4] = float("nan")
    assert value_loss(**tensors)[0].isnan()
    assert value_loss(**tensors, clip_range=None)[0].isnan() == (name != "old_values")


@pytest.mark.parametrize("size", [0, 5])
def test_nothing_to_count_gives_0_that_can_be_differentiated(size):
    values = torch.randn(size, requires_grad=True)
    loss, stats = value_loss(values, torch.randn(size), torch.randn(size), torch.zeros(size, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not values.grad.any() and not any(stats.values())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"returns": torch.zeros(3)}, ValueError, "returns (3,)"),
        ({"old_values": torch.zeros(4).double()}, TypeError, "old_values must be float32, got float64"),
        ({"mask": torch.ones(4)}, TypeError, "mask must be bool"),
        ({"returns": torch.zeros(4, requires_grad=True)}, ValueError, "returns gets no gradient"),
        ({"clip_range": -0.1}, ValueError, "or None, got -0.1"),
        ({"clip_range": float("nan")}, ValueError, "or None, got nan"),
        ({"denominator": -3}, ValueError, "denominator must be positive and finite, got -3"),
    ],
)
def test_bad_input_is_named(change, error, text):
    good = {name: torch.zeros(4) for name in ("values", "old_values", "returns")}
    with pytest.raises(error) as caught:
        value_loss(**{**good, **change})
    assert "value_loss: " in str(caught.value) and text in str(caught.value)
