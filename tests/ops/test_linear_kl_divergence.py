"""linear_kl_divergence against logits made whole in float64, and its promises about memory."""

import pytest
import torch
from compare import filled, peak_bytes
from torch.distributions import Categorical
from torch.distributions import kl_divergence as exact_kl

from fastrlhf import linear_kl_divergence
from fastrlhf.ops.kl_divergence import KINDS

T, V = 50, 700
kinds = pytest.mark.parametrize("kind", KINDS)


def inputs(dtype=torch.float32):
    """hidden_p, weight_p, hidden_q and weight_q of models of two widths."""
    tensors = []
    for width in (24, 40):
        tensors += [torch.randn(T, width).to(dtype), (torch.randn(V, width) * width**-0.5).to(dtype)]
    return tensors


def exact(*tensors, kind="forward", temperature=1.0):
    """By torch.distributions, in float64."""
    hidden_p, weight_p, hidden_q, weight_q = (t.double() for t in tensors)
    p, q = (Categorical(logits=h @ w.t() / temperature) for h, w in ((hidden_p, weight_p), (hidden_q, weight_q)))
    if kind != "js":
        return exact_kl(p, q) if kind == "forward" else exact_kl(q, p)
    middle = Categorical(probs=(p.probs + q.probs) / 2)
    return (exact_kl(p, middle) + exact_kl(q, middle)) / 2


def gradients(function, tensors, upstream, **options):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    divergence = function(*leaves, **options)
    return torch.autograd.grad(divergence, leaves, upstream.to(divergence.dtype))


@kinds
@pytest.mark.parametrize("memory_budget", [0, 20 * 2 * V * 4, 10**9])
@pytest.mark.parametrize("chunk_size", [1, 7, 512])
def test_it_is_that_of_the_whole_logits(chunk_size, memory_budget, kind):
    tensors, options = inputs(), {"kind": kind, "temperature": 0.7}
    upstream = torch.randn(T).masked_fill(torch.rand(T) < 0.3, 0.0)
    chunks = {"chunk_size": chunk_size, "memory_budget": memory_budget}
    divergence = linear_kl_divergence(*tensors, **options, **chunks)
    torch.testing.assert_close(divergence.double(), exact(*tensors, **options), rtol=1e-5, atol=1e-6)
    pairs = zip(
        gradients(linear_kl_divergence, tensors, upstream, **options, **chunks),
        gradients(exact, tensors, upstream, **options),
        strict=True,
    )
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize(
    "chunks",
    [{"chunk_size": 7}, {"chunk_size": 64, "batch_invariant": True}, {"memory_budget": 20 * 2 * V * 4}],
    ids=str,
)
def test_each_head_has_a_bias_a_low_rank_change_a_scale_and_a_cap(chunks, kind):
    """Against the logits of the summed weight, handed on by a head that is the identity."""
    (a_p, b_p), (a_q, b_q) = ((torch.randn(4, n) / n, torch.randn(V, 4)) for n in (24, 40))
    tensors = [*inputs(), torch.randn(V), torch.randn(V), a_p, b_p, a_q, b_q]
    upstream = torch.randn(T).masked_fill(torch.rand(T) < 0.3, 0.0)

    def ours(hidden_p, weight_p, hidden_q, weight_q, bias_p, bias_q, a_p, b_p, a_q, b_q):
        options = {"bias_p": bias_p, "bias_q": bias_q, "lora_p": (a_p, b_p, 0.6), "lora_q": (a_q, b_q, 2.0)}
        options |= {"logit_scale": (0.7, 1.3), "logit_softcap": (None, 2.5), "kind": kind, "temperature": 0.7}
        return linear_kl_divergence(hidden_p, weight_p, hidden_q, weight_q, **options, **chunks)

    def whole(*tensors):
        hidden_p, weight_p, hidden_q, weight_q, bias_p, bias_q, a_p, b_p, a_q, b_q = (t.double() for t in tensors)
        logits_p = 0.7 * (hidden_p @ (weight_p + 0.6 * b_p @ a_p).t() + bias_p)
        logits_q = 2.5 * torch.tanh(1.3 / 2.5 * (hidden_q @ (weight_q + 2 * b_q @ a_q).t() + bias_q))
        return exact(logits_p, torch.eye(V), logits_q, torch.eye(V), kind=kind, temperature=0.7)

    torch.testing.assert_close(ours(*tensors).double(), whole(*tensors), rtol=1e-5, atol=1e-6)
    pairs = zip(gradients(ours, tensors, upstream), gradients(whole, tensors, upstream), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_batch_invariant_rows_do_not_depend_on_the_others():
    hidden_p, weight_p, hidden_q, weight_q = inputs()
    results = []
    for rows in (slice(20, 27), slice(20, 21), slice(3, 27), slice(0, 50)):
        leaves = [hidden_p[rows].clone().requires_grad_(), hidden_q[rows].clone().requires_grad_()]
        options = {"chunk_size": 64, "batch_invariant": True, "logit_softcap": 3.0}
        divergence = linear_kl_divergence(leaves[0], weight_p, leaves[1], weight_q, **options)
        row = 20 - rows.start
        results.append([divergence[row], *(g[row] for g in torch.autograd.grad(divergence.sum(), leaves))])
    for result in filled(results[1:]):
        assert all(torch.equal(a, b) for a, b in filled(zip(result, results[0], strict=True)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_lose_nothing_further(dtype):
    tensors, upstream = inputs(dtype), torch.randn(T)
    divergence = linear_kl_divergence(*tensors, chunk_size=16)
    assert divergence.dtype == torch.float32
    torch.testing.assert_close(divergence.double(), exact(*tensors), rtol=1e-5, atol=1e-6)
    actual = gradients(linear_kl_divergence, tensors, upstream, chunk_size=16)
    for ours, theirs in zip(actual, gradients(exact, [t.double() for t in tensors], upstream), strict=True):
        eps = torch.finfo(dtype).eps  # rounded once, at the end
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=eps, atol=1e-6 + eps * 1e-2)


@kinds
@pytest.mark.parametrize("chosen", [{0}, {1}, {0, 1}, {2, 3}, {0, 2}])
def test_what_needs_no_gradient_changes_nothing_for_the_others(chosen, kind):
    tensors = inputs()
    every = gradients(linear_kl_divergence, tensors, torch.ones(T), kind=kind)
    leaves = [t.clone().requires_grad_(i in chosen) for i, t in enumerate(tensors)]
    linear_kl_divergence(*leaves, kind=kind).sum().backward()
    for i, (leaf, expected) in filled(enumerate(zip(leaves, every, strict=True))):
        assert torch.equal(leaf.grad, expected) if i in chosen else leaf.grad is None


def test_rows_without_an_upstream_gradient_are_not_looked_at_again():
    tensors, upstream = inputs(), torch.ones(T)
    upstream[::2] = 0
    grads = gradients(linear_kl_divergence, tensors, upstream)
    tensors[0][::2] = tensors[2][::2] = torch.nan
    for ours, theirs in filled(zip(gradients(linear_kl_divergence, tensors, upstream), grads, strict=True)):
        assert torch.equal(ours, theirs)


def test_one_model_on_both_sides_has_divergence_0_and_no_gradient():
    hidden, weight, *_ = inputs()
    assert not linear_kl_divergence(hidden, weight, hidden, weight, chunk_size=16).any()
    for grad in gradients(linear_kl_divergence, [hidden, weight] * 2, torch.ones(T), chunk_size=16):
        assert not grad.any()


def test_memory_is_that_of_a_chunk():
    tensors = [t.requires_grad_() for t in inputs()]
    outputs = sum(t.nbytes for t in tensors)
    used = peak_bytes(lambda: torch.autograd.grad(linear_kl_divergence(*tensors, chunk_size=5).sum(), tensors))
    assert used < outputs + 2 * 5 * V * 4 + 16 * 1024
    budget = 2 * T * V * 4
    kept = peak_bytes(lambda: linear_kl_divergence(*tensors, chunk_size=5, memory_budget=budget))
    assert budget < kept < budget + 2 * 5 * V * 4 + 16 * 1024


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"hidden_p": torch.zeros(3)}, ValueError, "hidden_p must be (T, D)"),
        ({"weight_p": torch.zeros(5, 3)}, ValueError, "weight_p must be (V, D)"),
        ({"hidden_q": torch.zeros(4, 6)}, ValueError, "hidden_q must be (T, E)"),
        ({"weight_q": torch.zeros(7, 6)}, ValueError, "weight_q must be (V, E)"),
        ({"weight_p": torch.zeros(0, 2), "weight_q": torch.zeros(0, 6)}, ValueError, "at least one row, got (0, 2)"),
        ({"weight_q": torch.zeros(5, 6).bfloat16()}, TypeError, "weight_q must be float32, got bfloat16"),
        ({"hidden_p": torch.zeros(3, 2).long()}, TypeError, "float16, got int64"),
        ({"weight_p": torch.zeros(5, 2, device="meta")}, ValueError, "must be on one device"),
        ({"kind": "both"}, ValueError, "kind must be one of forward, reverse, js, got 'both'"),
        ({"temperature": -1.0}, ValueError, "temperature must be above 0 and finite, got -1.0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"bias_q": torch.zeros(4)}, ValueError, "bias_q must be (V,) = (5,), got (4,)"),
        (
            {"lora_p": (torch.zeros(1, 3), torch.zeros(5, 1), 1.0)},
            ValueError,
            "lora_a_p must be (r, D) = (*, 2), got (1, 3)",
        ),
        ({"lora_q": torch.zeros(2)}, TypeError, "lora_q must be (a, b, scale)"),
        ({"logit_scale": (1.0, 0.0)}, ValueError, "logit_scale must be above 0 and finite, got 0.0"),
        ({"logit_softcap": (1.0,)}, ValueError, "logit_softcap must be one for both heads or two, got 1"),
        ({"batch_invariant": True, "chunk_size": 100}, ValueError, "chunk_size must be a multiple of 64, got 100"),
        ({"memory_budget": -1}, ValueError, "memory_budget must be a number of bytes, got -1"),
    ],
)
def test_bad_input_is_named(change, error, text):
    shapes = {"hidden_p": (3, 2), "weight_p": (5, 2), "hidden_q": (3, 6), "weight_q": (5, 6)}
    good = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(error) as caught:
        linear_kl_divergence(**{**good, **change})
    assert "linear_kl_divergence: " in str(caught.value) and text in str(caught.value)
