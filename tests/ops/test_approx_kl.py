"""Estimators of KL against arbitrary precision and against the divergence itself."""

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf import approx_kl


def k3_of(r):
    with mpmath.workdps(60):
        return float(mpmath.expm1(mpmath.mpf(r)) - mpmath.mpf(r))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-7), (torch.float64, 1e-13)])
def test_k3_keeps_its_digits_where_the_textbook_form_has_none(dtype, rtol):
    r = torch.tensor([1e-30, 1e-8, -1e-6, 1e-4, -1e-4, 0.01, 0.0624, -0.0626, 0.5, -2.0, 30.0, -80.0], dtype=dtype)
    expected = torch.tensor([k3_of(x) for x in r.tolist()], dtype=dtype)
    torch.testing.assert_close(approx_kl(torch.zeros_like(r), r, estimator="k3"), expected, rtol=rtol, atol=0)
    if dtype == torch.float32:  # the claim that makes this a test: exp(r) - 1 - r is useless there
        assert ((r.exp() - 1 - r - expected).abs() > expected)[3:5].any()


@given(st.floats(-80, 80, width=32))
@settings(max_examples=200, deadline=None)
def test_k3_is_accurate_everywhere(r):
    actual = approx_kl(torch.zeros(1), torch.tensor([r]), estimator="k3").item()
    assert actual == pytest.approx(k3_of(r), rel=3e-7, abs=1e-44)


def test_expectations_are_those_of_the_divergence():
    policy, reference = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    kl = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((policy.exp() * approx_kl(policy, reference, estimator=estimator)).sum(), kl)


def test_gradient_of_k2_is_that_of_kl_and_k1_has_none_on_average():
    scores, reference = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64).log_softmax(-1)

    def gradient(loss_of):
        leaf = scores.clone().requires_grad_()
        loss_of(leaf.log_softmax(-1)).backward()
        return leaf.grad

    expected = gradient(lambda policy: (policy.exp() * (policy - reference)).sum())
    chances = scores.softmax(-1)
    k1, k2, k3 = (
        gradient(lambda policy, name=name: (chances * approx_kl(policy, reference, estimator=name)).sum())
        for name in ("k1", "k2", "k3")
    )
    torch.testing.assert_close(k2, expected)
    torch.testing.assert_close(k1, torch.zeros_like(k1))
    assert not torch.allclose(k3, expected, rtol=0.01)


def test_overflow_is_inf_and_nan_stays_in_its_place():
    r = torch.tensor([float("nan"), 90.0, 1.0])
    k3 = approx_kl(torch.zeros(3), r, estimator="k3")
    assert k3.isnan().tolist() == [True, False, False] and k3.isinf().tolist() == [False, True, False]


def test_half_precision_becomes_float32():
    x = torch.randn(5).bfloat16()
    assert torch.equal(approx_kl(x, torch.zeros(5)), x.float())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"ref_logprobs": torch.zeros(3)}, ValueError, "logprobs (4,) and ref_logprobs (3,)"),
        ({"ref_logprobs": torch.zeros(4).double()}, TypeError, "ref_logprobs must be float32, got float64"),
        ({"logprobs": torch.zeros(4, dtype=torch.int64)}, TypeError, "logprobs must be float32, float64, got int64"),
        ({"ref_logprobs": torch.zeros(4, device="meta")}, ValueError, "must be on one device"),
        ({"estimator": "k4"}, ValueError, "estimator must be one of k1, k2, k3, got 'k4'"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error) as caught:
        approx_kl(**{"logprobs": torch.zeros(4), "ref_logprobs": torch.zeros(4), **change})
    assert "approx_kl: " in str(caught.value) and text in str(caught.value)
