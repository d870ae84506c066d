"""lora= of the ops on a linear head, against float64 logits of the summed weight and PEFT; its promises on memory."""

import pytest
import torch
import torch.nn.functional as F
from compare import filled, peak_bytes
from heads import LOSSES, D, V, exact, factors, inputs, logprobs

from fastrlhf import linear_cross_entropy, linear_token_logprobs

losses = pytest.mark.parametrize("loss", LOSSES)


def summed(hidden, weight, bias, a, b, scale, logit_scale=1.0, logit_softcap=None):
    """Whole logits in float64, from the weight and its change as one matrix."""
    hidden, weight, bias, a, b = (t.double() for t in (hidden, weight, bias, a, b))
    logits = logit_scale * F.linear(hidden, weight + scale * (b @ a), bias)
    return logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)


def results(function, tensors):
    """The value, and the gradients of all the tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 7},
        {"logit_scale": 0.7},
        {"logit_scale": 1.3, "logit_softcap": 5.0, "chunk_size": 7},
        {"chunk_size": 64, "batch_invariant": True},
    ],
    ids=str,
)
@losses
def test_it_is_that_of_the_summed_weight(loss, options):
    hidden, weight, targets = inputs(50)
    tensors = hidden, weight, torch.randn(V), *factors(4)
    of_logits = {k: v for k, v in options.items() if k.startswith("logit")}

    def ours(hidden, weight, bias, a, b):
        return loss(hidden, weight, targets, bias=bias, lora=(a, b, 0.6), **options)[0]

    def theirs(*tensors):
        return exact(loss, summed(*tensors, 0.6, **of_logits), targets)

    for actual, expected in filled(zip(results(ours, tensors), results(theirs, tensors), strict=True)):
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=3e-6 * scale)


@pytest.mark.parametrize("of_factors", [torch.float32, torch.bfloat16])
@losses
def test_half_precision_heads_lose_nothing_further(loss, of_factors):
    hidden, weight, targets = inputs(50, torch.bfloat16)
    tensors = hidden, weight, torch.randn(V).bfloat16(), *factors(4, of_factors)

    def ours(hidden, weight, bias, a, b):
        return loss(hidden, weight, targets, bias=bias, lora=(a, b, 0.6))[0]

    def theirs(*tensors):
        return exact(loss, summed(*tensors, 0.6), targets)

    wide = results(theirs, [t.double() for t in tensors])
    for tensor, actual, expected in zip((None, *tensors), results(ours, tensors), wide, strict=True):
        dtype = torch.float32 if tensor is None else tensor.dtype  # a gradient is rounded once, at the end
        eps, scale = torch.finfo(dtype).eps, expected.abs().max().item()
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=max(eps, 1e-5), atol=3e-6 * scale)


@pytest.mark.parametrize("trained", [{0}, {1}, {2}, {3}, {4}, {0, 3, 4}, {3, 4}])
@losses
def test_what_needs_no_gradient_changes_nothing_for_the_others(loss, trained):
    hidden, weight, targets = inputs(50)
    tensors = hidden, weight, torch.randn(V), *factors(4)

    def ours(hidden, weight, bias, a, b):
        return loss(hidden, weight, targets, bias=bias, lora=(a, b, 0.6), chunk_size=30)[0]

    _, *every = results(ours, tensors)
    leaves = [t.clone().requires_grad_(i in trained) for i, t in enumerate(tensors)]
    ours(*leaves).backward()
    for i, (leaf, expected) in enumerate(zip(leaves, every, strict=True)):
        assert torch.equal(leaf.grad, expected) if i in trained else leaf.grad is None


def test_the_memory_of_a_frozen_head_is_that_of_a_chunk():
    hidden, weight, a, b = (torch.randn(shape) / 8 for shape in ((64, 256), (2000, 256), (4, 256), (2000, 4)))
    targets = torch.randint(2000, (64,))
    a.requires_grad_(), b.requires_grad_(), hidden.requires_grad_()

    def step(function):
        loss = function(hidden, weight, targets, lora=(a, b, 0.5), chunk_size=8)
        torch.autograd.backward(loss, torch.ones_like(loss))

    for function in (linear_cross_entropy, linear_token_logprobs):
        assert peak_bytes(lambda f=function: step(f)) < weight.nbytes / 4
    weight.requires_grad_()
    assert peak_bytes(lambda: step(linear_cross_entropy)) > weight.nbytes  # the meter works


def test_logits_that_the_budget_keeps_give_the_same():
    hidden, weight, targets = inputs(90)
    tensors, kept = (hidden, weight, *factors(4)), []
    for rows in (0, 45, 90):
        options = {"chunk_size": 45, "memory_budget": rows * V * 4}

        def ours(hidden, weight, a, b, options=options):
            return logprobs(hidden, weight, targets, lora=(a, b, 0.6), **options)[0]

        kept.append(results(ours, tensors))
    for result in filled(kept[1:]):
        assert all(torch.equal(x, y) for x, y in filled(zip(result, kept[0], strict=True)))


@pytest.mark.parametrize("memory_budget", [0, 45 * V * 4])
@pytest.mark.parametrize("trained", [{0}, {0, 2, 3}, {0, 1, 2, 3}])
def test_log_probabilities_alone_get_the_same_gradients(trained, memory_budget):
    """As their forward makes gradients of its own."""
    hidden, weight, targets = inputs(90)
    tensors = [t.requires_grad_(i in trained) for i, t in enumerate((hidden, weight, *factors(4)))]
    upstream, bias = torch.randn(90).masked_fill(torch.rand(90) < 0.3, 0.0), torch.zeros(V)
    options = {"lora": (*tensors[2:], 0.6), "memory_budget": memory_budget, "chunk_size": 20}
    actual = linear_token_logprobs(hidden, weight, targets, **options)
    expected = -F.cross_entropy(summed(hidden, weight, bias, *tensors[2:], 0.6), targets, reduction="none")
    leaves = [t for t in tensors if t.requires_grad]
    grads = torch.autograd.grad(expected, leaves, upstream.double())
    for ours, exact_grad in filled(zip(torch.autograd.grad(actual, leaves, upstream), grads, strict=True)):
        torch.testing.assert_close(ours, exact_grad, rtol=1e-5, atol=3e-6 * exact_grad.abs().max().item())


def test_rows_that_do_not_count_are_not_looked_at():
    hidden, weight, targets = inputs(60)
    mask, tensors = torch.rand(60) < 0.5, (weight, *factors(4))
    made = []
    for function in (linear_cross_entropy, linear_token_logprobs):
        for fill in (0.0, torch.nan):

            def ours(weight, a, b, function=function, fill=fill):
                rows = hidden.masked_fill(~mask[:, None], fill)
                options = {"lora": (a, b, 0.6), "chunk_size": 16}
                if function is linear_cross_entropy:
                    return function(rows, weight, targets, mask=mask, **options)
                return function(rows, weight, targets, **options)[mask].sum()

            made.append(results(ours, tensors))
    for plain, poisoned in filled(zip(made[::2], made[1::2], strict=True)):
        assert all(torch.equal(x, y) for x, y in filled(zip(plain, poisoned, strict=True)))


def test_it_is_what_peft_makes_of_a_head():
    peft = pytest.importorskip("peft", reason="needs PEFT")
    head = torch.nn.Sequential(torch.nn.Linear(D, V))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(head, config).base_model.model[0]
    hidden, _, targets = inputs(50)
    hidden.requires_grad_()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    loss = linear_cross_entropy(hidden, layer.weight, targets, bias=layer.bias, lora=(a, b, layer.scaling["default"]))
    expected = F.cross_entropy(layer(hidden), targets)
    torch.testing.assert_close(loss, expected)
    actual = torch.autograd.grad(loss, (hidden, a, b))
    for ours, theirs in zip(actual, torch.autograd.grad(expected, (hidden, a, b)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


A, B = torch.zeros(2, D), torch.zeros(V, 2)


@pytest.mark.parametrize(
    ("lora", "error", "text"),
    [
        ((A, B), TypeError, "lora must be (a, b, scale), two tensors and a number, got Tensor, Tensor"),
        ((A, B, A), TypeError, "two tensors and a number, got Tensor, Tensor, Tensor"),
        (A, TypeError, "two tensors and a number, got Tensor"),
        ((A, None, 1.0), TypeError, "two tensors and a number, got Tensor, NoneType, float"),
        ((A, B, float("nan")), ValueError, "the scale of lora must be finite, got nan"),
        ((A.t(), B, 1.0), ValueError, f"lora_a must be (r, D) = (*, {D}), got ({D}, 2)"),
        ((A, B.t(), 1.0), ValueError, f"lora_b must be (V, r) = ({V}, 2), got (2, {V})"),
        ((A[:0], B[:, :0], 1.0), ValueError, f"lora_a must have at least one row, got (0, {D})"),
        ((A, B.double(), 1.0), TypeError, "lora_b must be float32, got float64"),
        ((A.bfloat16(), B, 1.0), TypeError, "lora_a must be float32, got bfloat16"),
        ((A, B.to("meta"), 1.0), ValueError, "all tensors must be on one device"),
    ],
)
@losses
def test_bad_factors_are_named(loss, lora, error, text):
    with pytest.raises(error) as caught:
        loss(*inputs(3), lora=lora)
    assert str(caught.value).startswith("linear_") and text in str(caught.value)
