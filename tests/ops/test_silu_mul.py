"""silu(gate) up: torch's own functions in float64, in every dtype, where the sigmoid saturates too."""

import pytest
import torch
import torch.nn.functional as F

from fastrlhf import silu_mul

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", [(7, 5), (3, 2, 64), (300, 333)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_output_and_gradients_are_those_of_torch_in_float64_rounded_once(shape, dtype):
    inputs, grad = [(3 * torch.randn(shape)).to(dtype) for _ in range(2)], torch.randn(shape).to(dtype)
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = silu_mul(*leaves)
    out.backward(grad)
    exact = [t.double().requires_grad_() for t in inputs]
    expected = F.silu(exact[0]) * exact[1]
    expected.backward(grad.double())
    eps = torch.finfo(dtype).eps
    for ours, theirs in ((out, expected), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))):
        assert ours.dtype == dtype
        half = (
            dtype in FLOATS[2:]
        )  # of which the last digit is right; a sum of many terms is as accurate as its largest
        near = (0.01 if half else 16) * eps * theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=eps if half else 0, atol=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_out_the_gate_passes_or_blocks_and_has_slope_1_or_0(dtype):
    gate = torch.tensor([-800.0, -100.0, 100.0, 800.0], dtype=dtype, requires_grad=True)
    out = silu_mul(gate, torch.ones_like(gate))
    out.sum().backward()
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 100.0, 800.0], dtype=dtype))
    torch.testing.assert_close(gate.grad, torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=dtype))


def test_nan_stays_where_it_is():
    gate, up = torch.randn(40), torch.randn(40)
    gate[3] = up[20] = torch.nan
    assert silu_mul(gate, up).isnan().nonzero()[:, 0].tolist() == [3, 20]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"gate": torch.zeros(2, 4).long()}, TypeError, "gate must be float32"),
        ({"up": torch.zeros(2, 4).bfloat16()}, TypeError, "up must be float32, got bfloat16"),
        ({"up": torch.zeros(4)}, ValueError, "gate (2, 4) and up (4,) must have the same shape"),
        ({"up": torch.zeros(2, 4, device="meta")}, ValueError, "one device"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error) as caught:
        silu_mul(**{"gate": torch.zeros(2, 4), "up": torch.zeros(2, 4), **change})
    assert "silu_mul: " in str(caught.value) and text in str(caught.value)
