"""rows weight^T: the product in float64, and the same bits for a row whatever stands beside it."""

import pytest
import torch

from fastrlhf import thin_linear

FLOATS = [torch.float32, torch.float64]
SHAPES = [(1, 1, 1), (3, 17, 5), (16, 256, 256), (33, 704, 64), (48, 25, 300), (64, 100, 704), (131, 50, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_output_is_the_product_in_float64(shape, dtype):
    num_rows, num_outputs, width = shape
    rows, weight = torch.randn(num_rows, width, dtype=dtype), torch.randn(num_outputs, width, dtype=dtype)
    expected = torch.einsum("td,vd->tv", rows.double(), weight.double())
    near = torch.finfo(dtype).eps * width * (rows.double().abs() @ weight.double().abs().T).max()
    out = thin_linear(rows, weight)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=float(near))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_has_the_same_bits_in_every_batch(dtype):
    rows, weight = torch.randn(90, 200, dtype=dtype), torch.randn(77, 200, dtype=dtype)
    whole = thin_linear(rows, weight)
    for first, last in ((0, 1), (5, 21), (30, 78), (26, 90)):
        assert torch.equal(thin_linear(rows[first:last], weight), whole[first:last])


def test_rows_and_weights_may_lie_in_any_order():
    rows, weight = torch.randn(20, 9).T, torch.randn(20, 31).T
    torch.testing.assert_close(thin_linear(rows, weight), rows @ weight.T)


def test_nan_stays_in_its_row_or_output():
    rows, weight = torch.randn(20, 30), torch.randn(40, 30)
    rows[3, 7] = weight[9, 1] = torch.nan
    found = thin_linear(rows, weight).isnan()
    assert found[3].all() and found[:, 9].all() and found.sum() == 40 + 20 - 1


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rows": torch.zeros(2, 4).bfloat16()}, TypeError, "rows must be float32, float64, got bfloat16"),
        ({"weight": torch.zeros(3, 4).double()}, TypeError, "weight must be float32, got float64"),
        ({"rows": torch.zeros(1, 2, 4)}, ValueError, "rows must be (T, D) = (*, *), got (1, 2, 4)"),
        ({"weight": torch.zeros(3, 5)}, ValueError, "weight must be (V, D) = (*, 4), got (3, 5)"),
        ({"weight": torch.zeros(3, 4, device="meta")}, ValueError, "one device"),
        ({"rows": torch.zeros(2, 4, requires_grad=True)}, ValueError, "rows gets no gradient, so it must be detached"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error) as caught:
        thin_linear(**{"rows": torch.zeros(2, 4), "weight": torch.zeros(3, 4), **change})
    assert "thin_linear: " in str(caught.value) and text in str(caught.value)
