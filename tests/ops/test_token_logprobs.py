"""token_logprobs against closed forms, torch's log_softmax in float64 and torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Categorical

from fastrlhf import token_logprobs
from fastrlhf.ops.token_logprobs import rows_of, token_logprobs_backward_ref, token_logprobs_ref

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def exact(logits, targets, temperature=1.0):
    """By torch.distributions, in float64: log-probability of the target and entropy."""
    rows = Categorical(logits=logits.double() / temperature)
    return rows.log_prob(targets), rows.entropy()


def gradient(logits, targets, upstream, **options):
    """Gradient of upstream[0] . logprobs + upstream[1] . entropy, of a copy of the logits that is not a leaf."""
    leaf = logits.clone().requires_grad_()
    outputs = token_logprobs(leaf * 1, targets, return_entropy=True, **options)
    return torch.autograd.grad(outputs, leaf, upstream)[0]


def test_equal_logits_have_probability_one_over_v():
    for size in (1, 2, 1000, 256_000):
        logprobs, entropy = token_logprobs(torch.full((2, size), 3.0), torch.tensor([0, size - 1]), return_entropy=True)
        torch.testing.assert_close(logprobs, torch.full((2,), -math.log(size)), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(entropy, torch.full((2,), math.log(size)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gap", [0.1, 5.0, 15.0, 80.0])
def test_two_tokens_give_the_logistic_function(gap):
    logprobs = token_logprobs(torch.tensor([[gap, 0.0], [gap, 0.0]]), torch.tensor([0, 1]))
    small = math.log1p(math.exp(-gap))
    torch.testing.assert_close(logprobs.double(), torch.tensor([-small, -gap - small]).double(), rtol=1e-6, atol=1e-7)


@dtypes
@pytest.mark.parametrize("shape", [(7, 33), (3, 5003), (40, 129)])
def test_it_is_log_softmax_and_shannon_entropy(shape, dtype):
    logits, targets = (4 * torch.randn(shape)).to(dtype), torch.randint(shape[1], shape[:1])
    for temperature in (1.0, 0.3, torch.linspace(0.4, 3.0, shape[0])):
        divisor = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature
        outputs = token_logprobs(logits, targets, temperature=temperature, return_entropy=True)
        for output, expected in zip(outputs, exact(logits, targets, divisor), strict=True):
            assert output.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(output.double(), expected, rtol=1e-6, atol=4e-6)


@dtypes
def test_gradients_are_those_of_torch(dtype):
    logits, targets = (3 * torch.randn(9, 1500)).to(dtype), torch.randint(1500, (9,))
    wide = torch.promote_types(dtype, torch.float32)
    upstream, temperature = torch.randn(2, 9, dtype=wide).unbind(), torch.linspace(0.5, 2.0, 9, dtype=wide)
    leaf = logits.double().requires_grad_()
    expected = torch.autograd.grad(
        exact(leaf, targets, temperature.double()[:, None]), leaf, [g.double() for g in upstream]
    )[0]
    actual = gradient(logits, targets, upstream, temperature=temperature)
    assert actual.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(actual.double(), expected, rtol=2 * eps, atol=2 * eps)


def test_a_shift_of_all_logits_changes_nothing():
    logits, targets = torch.randn(4, 700).bfloat16().float(), torch.randint(700, (4,))
    upstream = torch.randn(2, 4).unbind()
    here, grad = token_logprobs(logits, targets, return_entropy=True), gradient(logits, targets, upstream)
    for shift in (-16384.0, -256.0, 16384.0):
        moved = (logits + shift).double().sub(shift).float()  # what is left of the logits beside the shift
        there = token_logprobs(logits + shift, targets, return_entropy=True)
        for a, b in zip(there, token_logprobs(moved, targets, return_entropy=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(
            gradient(logits + shift, targets, upstream), gradient(moved, targets, upstream), rtol=1e-5, atol=1e-7
        )
    assert all(t.isfinite().all() for t in (*here, grad))


@pytest.mark.parametrize("size", [40, 3000])
def test_minus_infinity_is_as_if_the_token_did_not_exist(size):
    logits, kept = torch.randn(5, size), torch.rand(size) < 0.3
    kept[:5] = True
    targets, upstream = torch.arange(5), torch.randn(2, 5).unbind()
    masked = logits.masked_fill(~kept, -torch.inf)
    for a, b in zip(
        token_logprobs(masked, targets, return_entropy=True),
        token_logprobs(logits[:, kept], targets, return_entropy=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)
    grad = gradient(masked, targets, upstream)
    torch.testing.assert_close(grad[:, kept], gradient(logits[:, kept], targets, upstream), rtol=1e-5, atol=1e-6)
    assert not grad[:, ~kept].any()


def test_a_single_possible_token_is_certain():
    logits = torch.full((3, 2500), -torch.inf)
    logits[[0, 1, 2], [0, 2100, 2499]] = torch.tensor([0.0, 500.0, -500.0])
    targets = torch.tensor([0, 2100, 7])
    logprobs, entropy = token_logprobs(logits, targets, return_entropy=True)
    assert logprobs.tolist() == [0, 0, -math.inf] and entropy.tolist() == [0, 0, 0]
    grad = gradient(logits, targets, torch.ones(2, 3).unbind())
    assert not grad[:2].any() and grad[2, 7] == 1 and grad[2, 2499] == -1


@dtypes
@pytest.mark.parametrize("options", [{}, {"return_entropy": True}, {"inplace_backward": True}], ids=str)
def test_logsumexp_is_that_of_the_divided_logits(dtype, options):
    logits, targets = 3 * torch.randn(5, 3000) + torch.tensor([[-500.0], [0], [1], [90], [500]]), torch.arange(5)
    logits, temperature = logits.to(dtype), torch.tensor([0.5, 0.7, 1.0, 1.3, 2.0])
    leaf = logits.clone().requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    outputs = token_logprobs(leaf * 1, targets, temperature=temperature, return_logsumexp=True, **options)
    exact = (logits.double() / temperature[:, None].double()).logsumexp(-1)
    assert outputs[-1].dtype == wide and not outputs[-1].requires_grad and outputs[0].requires_grad
    torch.testing.assert_close(outputs[-1].double(), exact, rtol=4 * torch.finfo(wide).eps, atol=1e-5)
    assert torch.equal(outputs[0], token_logprobs(logits, targets, temperature=temperature))


@dtypes
def test_nan_and_impossible_rows_are_nan_and_no_other(dtype):
    logits = torch.randn(4, 3000).to(dtype)
    logits[1, 2999], logits[2], logits[3, 0] = torch.nan, -torch.inf, torch.inf
    targets = torch.zeros(4, dtype=torch.int64)
    outputs = token_logprobs(logits, targets, return_entropy=True)
    grad = gradient(logits, targets, [torch.ones_like(o) for o in outputs])
    for output in outputs:
        assert output.isnan().tolist() == [False, True, True, True]
    assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == [False, True, True, True]


def test_the_gradient_of_a_nearly_certain_token_keeps_its_digits():
    logits, upstream = torch.tensor([[20.0, 0.0, 0.0]]).double(), (torch.ones(1).double(), torch.zeros(1).double())
    lost = 2 * math.exp(-20) / (1 + 2 * math.exp(-20))  # 1 - p
    grad = gradient(logits, torch.tensor([0]), upstream)
    torch.testing.assert_close(grad, torch.tensor([[lost, -lost / 2, -lost / 2]]).double(), rtol=1e-6, atol=0)


def test_rows_with_no_upstream_gradient_are_exactly_zero():
    logits, used = torch.randn(6, 100), torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 0.0])
    logits[1] = torch.nan
    grad = gradient(logits, torch.arange(6), (used, torch.tensor([0.0, 0, 0, 0, 1, 0])))
    assert grad.abs().sum(1).bool().tolist() == [True, False, True, False, True, False] and grad.isfinite().all()


@dtypes
def test_the_reference_gradient_is_that_of_the_kernel(dtype):
    logits, targets = (2 * torch.randn(6, 300)).to(dtype), torch.tensor([0, 299, 5, -1, 300, 7])
    logits[1, 3:] = -torch.inf
    wide = torch.promote_types(dtype, torch.float32)
    temperature, (g, h) = torch.linspace(0.5, 2, 6, dtype=wide), torch.randn(2, 6, dtype=wide)
    g[5] = h[5] = 0
    ops = torch.ops.fastrlhf
    for ours, theirs in zip(
        ops.token_logprobs(logits, targets, temperature), token_logprobs_ref(logits, targets, temperature), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=4e-6, equal_nan=True)
    _, *statistics = ops.token_logprobs(logits, targets, temperature)
    for upstream in ((g, h), (g, None), (None, h)):
        args = (*upstream, logits, targets, temperature, *statistics)
        actual, expected = ops.token_logprobs_backward(*args), token_logprobs_backward_ref(*args)
        eps = max(torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(actual, expected, rtol=2 * eps, atol=eps, equal_nan=True)
        assert actual.isnan().all(1).tolist() == [False, False, False, True, True, False]
        copy = logits.clone()
        ops.token_logprobs_backward_(*upstream, copy, *args[3:])
        assert torch.equal(copy.nan_to_num(), actual.nan_to_num())


def test_rows_of_a_wider_tensor_are_read_where_they_are():
    wide, targets = torch.randn(5, 400), torch.randint(300, (5,))
    view = wide[:, 50:350]
    assert rows_of(view) is view
    ours, theirs = token_logprobs(view, targets), token_logprobs(view.clone(), targets)
    assert torch.equal(ours, theirs)
    assert torch.equal(token_logprobs(wide.t().contiguous().t()[:, 50:350], targets), theirs)
    assert torch.equal(token_logprobs(view[:1].expand(5, -1), targets)[:1], theirs[:1])


def test_addresses_beyond_32_bits():
    step = 2**31 + 8
    logits = torch.empty_strided((2, 4), (step, 1), dtype=torch.bfloat16)  # only two pages of it are ever touched
    logits.copy_(torch.tensor([[0.0, 1, 2, 3], [3, 2, 1, 0]]))
    logprobs = token_logprobs(logits, torch.tensor([3, 3]))
    torch.testing.assert_close(logprobs.double(), exact(logits, torch.tensor([3, 3]))[0], rtol=1e-6, atol=1e-6)


def test_the_number_of_threads_does_not_change_a_bit():
    logits, targets, before = torch.randn(37, 4001), torch.randint(4001, (37,)), torch.get_num_threads()
    upstream, results = torch.randn(2, 37).unbind(), []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        outputs = token_logprobs(logits, targets, return_entropy=True)
        results.append((*outputs, gradient(logits, targets, upstream)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


@dtypes
def test_an_in_place_gradient_is_the_same_and_lies_in_the_logits(dtype):
    source, targets = torch.randn(5, 300).to(dtype), torch.randint(300, (5,))
    for cut in (slice(0, 300), slice(10, 200)):
        logits = source.clone().requires_grad_()
        middle = (logits * 1)[:, cut]
        middle.retain_grad()
        version = middle._version
        targets = targets.clamp(max=middle.shape[1] - 1)
        logprobs, entropy = token_logprobs(middle, targets, return_entropy=True, inplace_backward=True)
        (logprobs.sum() + 0.3 * entropy.sum()).backward()
        upstream = (torch.ones_like(logprobs), torch.full_like(logprobs, 0.3))
        assert torch.equal(logits.grad[:, cut], gradient(source[:, cut], targets, upstream))
        assert torch.equal(middle.detach(), logits.grad[:, cut]) and middle._version > version


def test_an_in_place_backward_runs_only_once():
    logits, targets = torch.randn(3, 20, requires_grad=True), torch.zeros(3, dtype=torch.int64)
    loss = token_logprobs(logits * 1, targets, inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_in_place_backward_is_noticed_by_others_who_need_the_logits():
    source, targets = torch.randn(3, 20, requires_grad=True), torch.zeros(3, dtype=torch.int64)
    logits = source.exp()  # exp saves its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        token_logprobs(logits, targets, inplace_backward=True).sum().backward()


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_a_second_derivative_raises(inplace_backward):
    logits = torch.randn(3, 20, requires_grad=True)
    logprobs = token_logprobs(logits * 1, torch.zeros(3, dtype=torch.int64), inplace_backward=inplace_backward)
    (grad,) = torch.autograd.grad((logprobs**2).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


def test_in_place_is_refused_under_compile():
    torch.compiler.reset()

    def loss(logits, targets):
        return token_logprobs(logits * 1, targets, inplace_backward=True).sum()

    with pytest.raises(Exception, match=r"not supported under torch\.compile"):
        torch.compile(loss, fullgraph=True, backend="eager")(
            torch.randn(3, 20, requires_grad=True), torch.zeros(3, dtype=torch.int64)
        )


LEAF = torch.zeros(3, 4, requires_grad=True)


@pytest.mark.parametrize(
    ("logits", "text"),
    [
        (LEAF, "a leaf, or a view of one"),
        (LEAF.view(3, 4), "a leaf, or a view of one"),
        ((LEAF[:1] * 1).expand(3, 4), "rows of consecutive elements that do not overlap"),
        ((LEAF * 1).as_strided((3, 4), (1, 3)), "rows of consecutive elements that do not overlap"),
    ],
)
def test_logits_that_cannot_be_overwritten_are_refused(logits, text):
    with pytest.raises(ValueError, match=text):
        token_logprobs(logits, torch.zeros(3, dtype=torch.int64), inplace_backward=True)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits": torch.zeros(3)}, ValueError, "logits must be (T, V)"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "at least one column, got (3, 0)"),
        (
            {"logits": torch.zeros(3, 5).long()},
            TypeError,
            "logits must be float32, float64, bfloat16, float16, got int64",
        ),
        ({"targets": torch.zeros(3)}, TypeError, "targets must be int64, got float32"),
        ({"targets": torch.zeros(4).long()}, ValueError, "targets must be (T,) = (3,), got (4,)"),
        ({"targets": torch.tensor([0, 5, 1])}, ValueError, "targets must be in [0, 5), got values from 0 to 5"),
        ({"targets": torch.tensor([0, -100, 1])}, ValueError, "got values from -100 to 1"),
        ({"targets": torch.zeros(3, device="meta").long()}, ValueError, "must be on one device"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0 and finite, got 0.0"),
        ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "every temperature must be above 0 and finite"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature must be (3,) or (1,), got (2,)"),
        ({"temperature": torch.ones(3, requires_grad=True)}, ValueError, "temperature gets no gradient"),
    ],
)
def test_bad_input_is_named(change, error, text):
    good = {"logits": torch.zeros(3, 5), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(error) as caught:
        token_logprobs(**{**good, **change})
    assert "token_logprobs: " in str(caught.value) and text in str(caught.value)
