"""Rows over their root mean square: torch's own norm, in every dtype, and nothing lost at the ends of the range."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastrlhf import rms_norm

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", [(7, 5), (3, 2, 64), (1100, 256), (9, 1111)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_output_and_gradients_are_those_of_torch_in_float64_rounded_once(shape, dtype):
    hidden, grad = (torch.randn(shape).to(dtype) for _ in range(2))
    weight = (1 + torch.randn(shape[-1])).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    out = rms_norm(*leaves, eps=1e-6)
    out.backward(grad)
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    expected = F.rms_norm(exact[0], shape[-1:], exact[1], 1e-6)
    expected.backward(grad.double())
    eps = torch.finfo(dtype).eps
    for ours, theirs in ((out, expected), (leaves[0].grad, exact[0].grad), (leaves[1].grad, exact[1].grad)):
        assert ours.dtype == dtype
        half = (
            dtype in FLOATS[2:]
        )  # of which the last digit is right; a sum of many terms is as accurate as its largest
        near = (0.01 if half else 16) * eps * theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=eps if half else 0, atol=near)


def test_it_is_the_norm_of_llama():
    norm, hidden = LlamaRMSNorm(48, eps=1e-5), 3 * torch.randn(6, 48)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(rms_norm(hidden, norm.weight, eps=1e-5), norm(hidden))


def test_rows_of_zeros_give_zeros_and_a_gradient_over_the_root_of_eps():
    hidden, weight = torch.zeros(2, 3, requires_grad=True), torch.tensor([1.0, 2.0, 3.0])
    out = rms_norm(hidden, weight, eps=1e-4)
    out.sum().backward()
    assert not out.any()
    torch.testing.assert_close(hidden.grad, 100 * weight.expand(2, 3))


def test_the_gradient_of_the_weight_does_not_depend_on_threads():
    hidden, weight, grads = torch.randn(1500, 130), torch.randn(130, requires_grad=True), []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        grads += torch.autograd.grad(rms_norm(hidden, weight, eps=1e-6).square().sum(), weight)
    torch.set_num_threads(before)
    assert torch.equal(*grads)


def test_nan_stays_in_its_row():
    hidden = torch.randn(4, 9)
    hidden[2, 3] = torch.nan
    assert rms_norm(hidden, torch.ones(9), eps=1e-6).isnan().any(-1).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"hidden": torch.zeros(2, 4).long()}, TypeError, "hidden must be float32"),
        ({"hidden": torch.tensor(1.0)}, ValueError, "hidden must be (..., D), got ()"),
        ({"weight": torch.ones(4).bfloat16()}, TypeError, "weight must be float32, got bfloat16"),
        ({"weight": torch.ones(3)}, ValueError, "weight must be (D,) = (4,), got (3,)"),
        ({"weight": torch.ones(4, device="meta")}, ValueError, "one device"),
        ({"eps": -1e-6}, ValueError, "eps must be a number from 0 up, got -1e-06"),
        ({"eps": float("nan")}, ValueError, "got nan"),
    ],
)
def test_bad_input_is_named(change, error, text):
    good = {"hidden": torch.zeros(2, 4), "weight": torch.ones(4), "eps": 1e-6}
    with pytest.raises(error) as caught:
        rms_norm(**{**good, **change})
    assert "rms_norm: " in str(caught.value) and text in str(caught.value)
