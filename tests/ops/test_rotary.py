"""Rotary embedding: a product of complex numbers, undone by its transpose, and what transformers computes."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fastrlhf import rotary

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def angles(num_tokens, width, dtype=torch.float64):
    inverse = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(num_tokens, dtype=torch.float64)[:, None] * torch.cat([inverse, inverse])
    return angle.cos().to(dtype), angle.sin().to(dtype), angle[:, : width // 2]


@pytest.mark.parametrize(("heads", "width"), [(3, 64), (1, 2), (2, 20), (4, 128)])
def test_halves_are_turned_as_complex_numbers(heads, width):
    states = torch.randn(30, heads, width, dtype=torch.float64, requires_grad=True)
    cos, sin, angle = angles(30, width)
    first, second = states.detach().chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None]
    out = rotary(states, cos, sin)
    torch.testing.assert_close(out, torch.cat([turned.real, turned.imag], -1))
    out.backward(out.detach())  # a rotation's gradient turns back
    torch.testing.assert_close(states.grad, states.detach())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_it_is_the_rotation_of_transformers(dtype):
    states, grad = (torch.randn(40, 4, 32).to(dtype) for _ in range(2))
    cos, sin, _ = angles(40, 32, dtype)
    leaf, exact = states.clone().requires_grad_(), states.double().requires_grad_()
    out = rotary(leaf, cos, sin)
    out.backward(grad)
    # theirs: (batch, heads, tokens, width)
    theirs = exact.transpose(0, 1)[None]
    expected = apply_rotary_pos_emb(theirs, theirs, cos.double()[None], sin.double()[None])[0][0].transpose(0, 1)
    expected.backward(grad.double())
    eps = torch.finfo(dtype).eps
    for ours, other in ((out, expected.detach()), (leaf.grad, exact.grad)):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), other, rtol=eps, atol=8 * eps)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"states": torch.zeros(2, 3, 4).long()}, TypeError, "states must be float32"),
        ({"states": torch.zeros(2, 4)}, ValueError, "states must be (T, H, K)"),
        ({"states": torch.zeros(2, 3, 5)}, ValueError, "K must be even, got 5"),
        ({"cos": torch.zeros(2, 2)}, ValueError, "cos must be (T, K) = (2, 4), got (2, 2)"),
        ({"sin": torch.zeros(1, 4)}, ValueError, "cos (2, 4) and sin (1, 4) must have the same shape"),
        ({"cos": torch.zeros(2, 4).half()}, TypeError, "cos must be float32, got float16"),
        ({"cos": torch.zeros(2, 4, requires_grad=True)}, ValueError, "cos gets no gradient"),
        ({"sin": torch.zeros(2, 4, device="meta")}, ValueError, "one device"),
    ],
)
def test_bad_input_is_named(change, error, text):
    good = {"states": torch.zeros(2, 3, 4), "cos": torch.zeros(2, 4), "sin": torch.zeros(2, 4)}
    with pytest.raises(error) as caught:
        rotary(**{**good, **change})
    assert "rotary: " in str(caught.value) and text in str(caught.value)
