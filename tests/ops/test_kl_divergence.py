"""kl_divergence against closed forms and torch.distributions in float64."""

import math

import pytest
import torch
from compare import filled
from torch.distributions import Categorical
from torch.distributions import kl_divergence as exact_kl

from fastrlhf import kl_divergence
from fastrlhf.ops.kl_divergence import KINDS, kl_divergence_backward_ref

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
kinds = pytest.mark.parametrize("kind", KINDS)


def exact(logits_p, logits_q, *, kind="forward", temperature=1.0):
    """By torch.distributions, in float64."""
    p, q = (Categorical(logits=x.double() / temperature) for x in (logits_p, logits_q))
    if kind != "js":
        return exact_kl(p, q) if kind == "forward" else exact_kl(q, p)
    middle = Categorical(probs=(p.probs + q.probs) / 2)
    return (exact_kl(p, middle) + exact_kl(q, middle)) / 2


def pair(num_rows, size, dtype=torch.float32):
    first = 2 * torch.randn(num_rows, size)
    return first.to(dtype), (first + torch.randn(num_rows, size)).to(dtype)


def gradients(function, logits, upstream, **options):
    leaves = [x.detach().clone().requires_grad_() for x in logits]
    divergence = function(*leaves, **options)
    return torch.autograd.grad(divergence, leaves, upstream.to(divergence.dtype))


@kinds
@dtypes
@pytest.mark.parametrize("shape", [(7, 33), (3, 5003)])
def test_it_is_that_of_torch_distributions(shape, dtype, kind):
    logits = pair(*shape, dtype)
    for temperature in (1.0, 0.4):
        divergence = kl_divergence(*logits, kind=kind, temperature=temperature)
        assert divergence.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = exact(*logits, kind=kind, temperature=temperature)
        torch.testing.assert_close(divergence.double(), expected, rtol=2e-6, atol=1e-6)


@kinds
@dtypes
def test_gradients_are_those_of_torch(dtype, kind):
    logits, options = pair(6, 1500, dtype), {"kind": kind, "temperature": 0.7}
    upstream = torch.randn(6).double()
    expected = gradients(exact, [x.double() for x in logits], upstream, **options)
    for actual, wanted in filled(zip(gradients(kl_divergence, logits, upstream, **options), expected, strict=True)):
        eps = max(torch.finfo(dtype).eps, 1e-6)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), wanted, rtol=2 * eps, atol=eps)


@kinds
@pytest.mark.parametrize("side", [0, 1])
def test_a_side_that_needs_no_gradient_changes_nothing_for_the_other(side, kind):
    logits = pair(4, 50)
    both = gradients(kl_divergence, logits, torch.ones(4), kind=kind)
    alone = [x.clone().requires_grad_(i == side) for i, x in enumerate(logits)]
    kl_divergence(*alone, kind=kind).sum().backward()
    assert torch.equal(alone[side].grad, both[side]) and alone[1 - side].grad is None


@pytest.mark.parametrize("gap", [0.1, 2.0, 30.0])
def test_two_tokens_have_a_closed_form(gap):
    p, q = 1 / (1 + math.exp(-gap)), 0.5
    forward = p * math.log(p / q) - (1 - p) * (gap + math.log1p(math.exp(-gap)) + math.log(q))
    reverse = q * (math.log(q) + math.log1p(math.exp(-gap))) + q * (math.log(q) + gap + math.log1p(math.exp(-gap)))
    args = torch.tensor([[gap, 0.0]]), torch.zeros(1, 2)
    for kind, expected in (("forward", forward), ("reverse", reverse)):
        assert kl_divergence(*args, kind=kind).item() == pytest.approx(expected, rel=2e-6, abs=1e-7)


@kinds
@dtypes
def test_equal_distributions_have_divergence_and_gradient_of_exactly_0(dtype, kind):
    logits = (3 * torch.randn(4, 3001)).to(dtype)
    logits[1, ::2] = -torch.inf
    assert kl_divergence(logits, logits, kind=kind).tolist() == [0] * 4
    of_p, of_q = gradients(kl_divergence, (logits, logits), torch.ones(4), kind=kind)
    assert not of_p.any() and not of_q.any()


@kinds
def test_nearly_equal_distributions_keep_their_digits(kind):
    first = torch.randn(8, 2000)
    logits = first, first + 1e-2 * torch.randn(8, 2000)
    expected = exact(*logits, kind=kind)
    assert expected.max() < 1e-4
    torch.testing.assert_close(kl_divergence(*logits, kind=kind).double(), expected, rtol=0, atol=2.5e-7)


def test_distributions_that_share_no_token():
    first = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    second = first.flip(1)
    assert kl_divergence(first, second).tolist() == [math.inf]
    assert kl_divergence(first, second, kind="reverse").tolist() == [math.inf]
    assert kl_divergence(first, second, kind="js").item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("at", [0, 1023, 1024, 2999])
def test_one_token_that_only_the_first_may_draw_makes_it_infinite(at):
    first, second = pair(1, 3000)
    second[0, at] = -torch.inf
    assert kl_divergence(first, second).tolist() == [math.inf]
    assert kl_divergence(first, second, kind="reverse").isfinite().all()


def test_impossible_tokens_of_a_whole_block_come_before_the_others():
    """The maximum of q is -inf until its second block."""
    first, second = pair(2, 5000)
    first[:, :2048] = second[:, :2048] = -torch.inf
    torch.testing.assert_close(
        kl_divergence(first, second), kl_divergence(first[:, 2048:], second[:, 2048:]), rtol=1e-6, atol=1e-6
    )


@kinds
@pytest.mark.parametrize("size", [40, 3000])
def test_minus_infinity_in_both_is_as_if_the_token_did_not_exist(size, kind):
    (first, second), kept = pair(5, size), torch.rand(size) < 0.3
    kept[0] = True
    masked, less = [x.masked_fill(~kept, -torch.inf) for x in (first, second)], [first[:, kept], second[:, kept]]
    torch.testing.assert_close(kl_divergence(*masked, kind=kind), kl_divergence(*less, kind=kind), rtol=1e-6, atol=1e-6)
    upstream = torch.randn(5)
    pairs = (gradients(kl_divergence, logits, upstream, kind=kind) for logits in (masked, less))
    for whole, part in zip(*pairs, strict=True):
        torch.testing.assert_close(whole[:, kept], part, rtol=1e-5, atol=1e-6)
        assert not whole[:, ~kept].any()


@kinds
def test_a_shift_of_all_logits_changes_nothing(kind):
    logits = [x.bfloat16().float() for x in pair(4, 700)]
    here = kl_divergence(*logits, kind=kind)
    for shift in (-4096.0, 4096.0):
        moved = [(x + shift * sign).sub(shift * sign) for x, sign in zip(logits, (1, -1), strict=True)]
        there = kl_divergence(logits[0] + shift, logits[1] - shift, kind=kind)
        torch.testing.assert_close(there, kl_divergence(*moved, kind=kind), rtol=1e-6, atol=1e-6)
    assert here.isfinite().all()


@kinds
@dtypes
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_impossible_rows_are_nan_and_no_other(side, dtype, kind):
    logits = pair(4, 3000, dtype)
    logits[side][1, 2999], logits[side][2], logits[side][3, 0] = torch.nan, -torch.inf, torch.inf
    expected = [False, True, True, True]
    assert kl_divergence(*logits, kind=kind).isnan().tolist() == expected
    grads = gradients(kl_divergence, logits, torch.ones(4), kind=kind)
    assert grads[side].isnan().any(1).tolist() == expected and grads[1 - side][0].isfinite().all()


@kinds
def test_rows_with_no_upstream_gradient_are_exactly_zero(kind):
    logits = pair(4, 100)
    logits[0][1] = torch.nan
    for grad in filled(gradients(kl_divergence, logits, torch.tensor([1.0, 0.0, 2.0, 0.0]), kind=kind)):
        assert grad.abs().sum(1).bool().tolist() == [True, False, True, False] and grad.isfinite().all()


@dtypes
@pytest.mark.parametrize("jensen_shannon", [False, True])
@pytest.mark.parametrize("wanted", [[True, True], [True, False], [False, True]])
def test_the_gradient_is_that_of_the_reference_and_can_lie_in_the_logits(wanted, jensen_shannon, dtype):
    logits, ops = pair(6, 300, dtype), torch.ops.fastrlhf
    logits[0][1, 3:] = logits[1][1, 5:] = -torch.inf
    grad = torch.randn(6, dtype=torch.promote_types(dtype, torch.float32))
    grad[5] = 0
    _, statistics = ops.kl_divergence(*logits, 0.7, jensen_shannon)
    rest = statistics, 0.7, jensen_shannon, wanted
    copies = [x.clone() for x in logits]
    ops.kl_divergence_backward_(grad, *copies, *rest)
    results = zip(
        ops.kl_divergence_backward(grad, *logits, *rest),
        kl_divergence_backward_ref(grad, *logits, *rest),
        copies,
        logits,
        wanted,
        strict=True,
    )
    for actual, expected, copy, before, want in results:
        eps = max(torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(actual, expected, rtol=2 * eps, atol=eps)
        assert torch.equal(copy, actual if want else before)


def test_rows_of_wider_tensors_are_read_where_they_are():
    logits = pair(5, 300)
    wide = [torch.full((5, 400), torch.nan), torch.full((5, 333), torch.nan)]
    views = [w[:, 20:320].copy_(x) for w, x in zip(wide, logits, strict=True)]
    assert torch.equal(kl_divergence(*views), kl_divergence(*logits))
    ours, theirs = (gradients(kl_divergence, pair, torch.ones(5)) for pair in (views, logits))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@kinds
def test_the_number_of_threads_does_not_change_a_bit(kind):
    logits, upstream, before, results = pair(37, 4001), torch.randn(37), torch.get_num_threads(), []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append((kl_divergence(*logits, kind=kind), *gradients(kl_divergence, logits, upstream, kind=kind)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def test_a_second_derivative_raises():
    logits = [x.requires_grad_() for x in pair(3, 20)]
    (grad,) = torch.autograd.grad(kl_divergence(*logits).square().sum(), logits[0], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits_p": torch.zeros(3)}, ValueError, "logits_p must be (T, V)"),
        ({"logits_p": torch.zeros(3, 0), "logits_q": torch.zeros(3, 0)}, ValueError, "at least one column, got (3, 0)"),
        ({"logits_p": torch.zeros(3, 5).long()}, TypeError, "float16, got int64"),
        ({"logits_q": torch.zeros(3, 5).bfloat16()}, TypeError, "logits_q must be float32, got bfloat16"),
        ({"logits_q": torch.zeros(3, 6)}, ValueError, "logits_p (3, 5) and logits_q (3, 6) must have the same shape"),
        ({"logits_q": torch.zeros(3, 5, device="meta")}, ValueError, "must be on one device"),
        ({"kind": "backward"}, ValueError, "kind must be one of forward, reverse, js, got 'backward'"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0 and finite, got 0.0"),
        ({"temperature": math.inf}, ValueError, "temperature must be above 0 and finite, got inf"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error) as caught:
        kl_divergence(**{"logits_p": torch.zeros(3, 5), "logits_q": torch.zeros(3, 5), **change})
    assert "kl_divergence: " in str(caught.value) and text in str(caught.value)
