"""Whitening: what mean and variance come out, with and without a mask, alone and over processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf import masked_whiten


def biased_moments(x):
    return x.double().mean().item(), x.double().var(correction=0).item()


@pytest.mark.parametrize("masked", [False, True])
def test_mean_is_0_and_biased_variance_1_over_the_mask(masked):
    x, mask = 5 + 3 * torch.randn(40, 50), torch.rand(40, 50) < 0.3 if masked else None
    white = masked_whiten(x, mask)
    mean, variance = biased_moments(white[mask] if masked else white)
    assert abs(mean) < 1e-6 and abs(variance - 1) < 1e-6
    assert not masked or not white[~mask].any()


def test_center_false_keeps_the_mean_and_true_removes_it():
    # torchtune has this inverted: its whiten(shift_mean=True) adds the mean back
    x = 5 + 3 * torch.randn(1000)
    kept, removed = masked_whiten(x, center=False), masked_whiten(x, center=True)
    assert biased_moments(kept)[0] == pytest.approx(x.double().mean().item(), abs=1e-5)
    torch.testing.assert_close(kept - removed, x.mean().expand(1000), rtol=1e-5, atol=1e-5)
    assert torch.equal(removed, masked_whiten(x))


def test_a_large_mean_does_not_eat_the_variance():
    x = 1e6 + torch.arange(4.0)  # every element and the mean are exact in float32
    expected = torch.tensor([-1.5, -0.5, 0.5, 1.5]) / 1.25**0.5
    torch.testing.assert_close(masked_whiten(x), expected, rtol=1e-6, atol=0)


def test_equal_elements_and_single_elements_give_0():
    assert not masked_whiten(torch.full((7,), 3.0)).any()
    assert not masked_whiten(torch.tensor([3.0])).any()
    assert torch.equal(masked_whiten(torch.tensor([3.0]), center=False), torch.tensor([3.0]))


def test_an_empty_mask_gives_0():
    assert not masked_whiten(torch.randn(9), torch.zeros(9, dtype=torch.bool), center=False).any()
    assert masked_whiten(torch.empty(0)).shape == (0,)


def test_nan_outside_the_mask_does_not_leak_and_inside_is_shown():
    x, mask = torch.randn(100), torch.rand(100) < 0.5
    mask[:2] = torch.tensor([True, False])
    clean = masked_whiten(x, mask)
    x[1] = float("nan")
    assert torch.equal(masked_whiten(x, mask), clean)
    x[0] = float("nan")
    assert torch.equal(masked_whiten(x, mask).isnan(), mask)


@given(st.integers(1, 200_000), st.integers(2, 7))
@settings(max_examples=10, deadline=None)
def test_number_of_threads_does_not_change_a_bit(size, threads):
    x, before = torch.randn(size), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = masked_whiten(x, x > -1)
        torch.set_num_threads(threads)
        assert torch.equal(masked_whiten(x, x > -1), alone)
    finally:
        torch.set_num_threads(before)


def whiten_part(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x = torch.load(f"{folder}/x.pt")
    part, kept = (x[:700], x[:700] > 4.5) if rank == 0 else (x[700:], x[700:] > 4.5)
    white = masked_whiten(part, kept, center=False, group=torch.distributed.group.WORLD)
    torch.save(white, f"{folder}/white_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_of_a_group_whiten_as_one(tmp_path):
    x = 5 + torch.randn(1000)
    torch.save(x, tmp_path / "x.pt")
    torch.multiprocessing.spawn(whiten_part, (str(tmp_path),), nprocs=2)
    together = torch.cat([torch.load(tmp_path / f"white_{rank}.pt") for rank in (0, 1)])
    torch.testing.assert_close(together, masked_whiten(x, x > 4.5, center=False), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "x (4,) and mask (3,)"),
        ({"mask": torch.ones(4)}, TypeError, "mask must be bool, got float32"),
        ({"x": torch.zeros(4, dtype=torch.int32)}, TypeError, "x must be float32, float64, got int32"),
        ({"x": torch.zeros(4, requires_grad=True)}, ValueError, "x gets no gradient"),
        ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error, match="masked_") as caught:
        masked_whiten(**{"x": torch.zeros(4), **change})
    assert text in str(caught.value)


def test_moments_of_another_shape_are_refused_by_the_operator():
    with pytest.raises(ValueError, match=r"masked_whiten: moments must be \(3,\) = \(3,\), got \(2,\)"):
        torch.ops.fastrlhf.masked_whiten(torch.zeros(4), None, torch.zeros(2).double(), True, 1e-8)
