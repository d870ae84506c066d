"""linear_cross_entropy against torch's cross-entropies in float64, and its promises about memory and work."""

import pytest
import torch
import torch.nn.functional as F
from compare import filled, peak_bytes
from torch.autograd.profiler import profile

from fastrlhf import linear_cross_entropy
from fastrlhf.ops._registry import BACKEND

T, D, V = 50, 24, 700


def inputs(dtype=torch.float32, *, num_rows=T):
    """hidden, weight, bias and targets."""
    hidden, weight = torch.randn(num_rows, D).to(dtype), (torch.randn(V, D) / 3).to(dtype)
    return hidden, weight, torch.randn(V).to(dtype), torch.randint(V, (num_rows,))


def ours(hidden, weight, bias, targets, **options):
    return linear_cross_entropy(hidden, weight, targets, bias=bias, **options)


def theirs(hidden, weight, bias, targets, *, logit_scale=1.0, logit_softcap=None, **options):
    """From logits made whole, in float64, by torch's cross_entropy."""
    logits = logit_scale * F.linear(hidden.double(), weight.double(), bias.double())
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return F.cross_entropy(logits, targets, **options)


def loss_and_gradients(function, *args, upstream=1.0, **options):
    leaves = [t.detach().clone().requires_grad_() for t in args[:3]]
    loss = function(*leaves, args[3], **options)
    return loss.detach(), *torch.autograd.grad(upstream * loss, leaves)


def assert_all_close(actual, expected, *, rtol=1e-5, atol=1e-6):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 512])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.3}, {"logit_scale": 1.7, "logit_softcap": 5.0}])
def test_it_is_that_of_the_whole_logits_with_any_upstream_gradient(options, chunk_size):
    args = inputs()
    actual = loss_and_gradients(ours, *args, upstream=3.0, chunk_size=chunk_size, **options)
    assert_all_close(actual, loss_and_gradients(theirs, *args, upstream=3.0, **options))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
def test_it_is_that_of_torch():
    args = [t.double() if t.is_floating_point() else t for t in inputs()]
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16)

    def fused(hidden, weight, bias, targets):
        return F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, options=options)

    assert_all_close(loss_and_gradients(ours, *args), loss_and_gradients(fused, *args), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kept", [[], [3], range(0, T, 3)])
def test_masked_rows_are_not_looked_at(kept):
    hidden, weight, bias, targets = inputs()
    mask = torch.zeros(T, dtype=torch.bool)
    mask[list(kept)] = True
    ignored = targets.masked_fill(~mask, -100)
    hidden[~mask] = torch.nan
    loss, *grads = loss_and_gradients(ours, hidden, weight, bias, ignored, mask=mask, chunk_size=8)
    expected = loss_and_gradients(
        theirs, hidden.nan_to_num(), weight, bias, ignored, ignore_index=-100, reduction="sum"
    )
    assert not grads[0][~mask].any()
    assert_all_close((loss, *grads), (e / max(1, len(kept)) for e in expected))


def test_micro_batches_with_the_global_count_add_up():
    hidden, weight, bias, targets = inputs()
    mask = torch.rand(T) < 0.7
    whole = loss_and_gradients(ours, hidden, weight, bias, targets, mask=mask)
    parts = [
        loss_and_gradients(ours, hidden[s], weight, bias, targets[s], mask=mask[s], denominator=int(mask.sum()))
        for s in (slice(0, 20), slice(20, None))
    ]
    for i in (0, 2, 3):
        assert_all_close([parts[0][i] + parts[1][i]], [whole[i]])
    assert_all_close([torch.cat([part[1] for part in parts])], [whole[1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_rounded_once_and_after_scaling(dtype):
    args = inputs(dtype)
    upstream = 2.0**-10 if dtype == torch.bfloat16 else 2.0**13  # the second: what a gradient scaler is for
    loss, *grads = loss_and_gradients(ours, *args, upstream=upstream, chunk_size=16)
    exact = [t.double() if t.is_floating_point() else t for t in args]
    expected, *exact_grads = loss_and_gradients(theirs, *exact, upstream=upstream)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    eps = torch.finfo(dtype).eps
    for actual, exact in zip(grads, exact_grads, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), exact, rtol=eps / 1.9, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize(
    ("trained", "products"), [((), 1), (("hidden",), 2), (("weight",), 2), (("bias",), 1), (("hidden", "weight"), 3)]
)
def test_only_what_needs_a_gradient_costs_a_product(trained, products):
    hidden, weight, bias, targets = inputs()
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    full = dict(zip(named, loss_and_gradients(ours, hidden, weight, bias, targets)[1:], strict=True))
    for name in trained:
        named[name].requires_grad_()
    with profile() as recorded:
        loss = ours(hidden, weight, bias, targets)
        if trained:
            loss.backward()
    assert sum(event.name in ("aten::mm", "aten::addmm_") for event in recorded.function_events) == products
    for name, tensor in named.items():
        assert torch.equal(tensor.grad, full[name]) if name in trained else tensor.grad is None


def test_a_retained_graph_can_be_gone_through_again():
    hidden, weight, bias, targets = inputs()
    expected = loss_and_gradients(ours, hidden, weight, bias, targets)[2]
    weight.requires_grad_()
    loss = ours(hidden, weight, bias, targets)
    (3 * loss).backward(retain_graph=True)
    weight.grad.mul_(0)  # may not reach what the next backward reads
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_chunk_beyond_the_gradients(dtype):
    num_rows, width, size, chunk_size = 512, 16, 5000, 16
    hidden, weight = (torch.randn(n, width).to(dtype).requires_grad_() for n in (num_rows, size))
    targets, chunk = torch.randint(size, (num_rows,)), chunk_size * size * 4
    loss = []

    def forward_and_backward():
        loss.append(linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size))
        return torch.autograd.grad(3 * loss[0], (hidden, weight))

    grads = (num_rows + size) * width * (4 if dtype == torch.float32 else 6)  # made in float32, then rounded
    block = 4096 * width * 4 if dtype == torch.bfloat16 else 0
    small = 24 * num_rows * 4 + 2 * chunk_size * width * 4
    copies = 1 if BACKEND == "native" else 9  # the reference makes a few more tensors of the size of a chunk
    assert peak_bytes(forward_and_backward) <= copies * chunk + grads + block + small
    assert copies * chunk + block + small < num_rows * size * 4 / 2


def test_nan_in_a_row_that_counts_is_shown():
    hidden, weight, bias, targets = inputs()
    hidden[4, 2] = torch.nan
    loss, grad, *_ = loss_and_gradients(ours, hidden, weight, bias, targets)
    assert loss.isnan() and grad[4].isnan().all() and grad[:4].isfinite().all() and grad[5:].isfinite().all()


def test_compiles_with_its_gradient():
    torch.compiler.reset()
    hidden, weight, bias, targets = inputs()
    mask = torch.rand(T) < 0.7

    def loss(hidden, weight):
        return 3 * ours(hidden, weight, bias, targets, mask=mask)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        results.append(torch.autograd.grad(function(*leaves), leaves))
    assert all(torch.equal(a, b) for a, b in filled(zip(*results, strict=True)))


def test_a_second_derivative_raises():
    hidden, weight, bias, targets = inputs()
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(ours(hidden, weight, bias, targets) ** 2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


GOOD = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(3, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"hidden": torch.zeros(3)}, ValueError, "hidden must be (T, D)"),
        ({"weight": torch.zeros(4, 5)}, ValueError, "weight must be (V, D) = (*, 4), got (4, 5)"),
        ({"targets": torch.tensor([0, 5, 1])}, ValueError, "targets must be in [0, 5), got values from 0 to 5"),
        ({"targets": torch.tensor([0, -100, 1])}, ValueError, "targets must be in [0, 5), got values from -100 to 1"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be bool, got float32"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, "mask (2,) must have the same shape"),
        ({"mask": torch.ones(3, dtype=torch.bool, device="meta")}, ValueError, "must be on one device"),
        ({"denominator": 0}, ValueError, "denominator must be positive and finite, got 0"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be above 0 and finite, got 0.0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error) as caught:
        linear_cross_entropy(**{**GOOD, **change})
    assert "linear_cross_entropy: " in str(caught.value) and text in str(caught.value)
