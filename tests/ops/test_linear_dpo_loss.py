"""linear_dpo_loss against DPO written out on whole float64 logits, and its promises about memory and work."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import peak_bytes
from torch.autograd.profiler import profile

from fastrlhf import linear_dpo_loss, linear_token_logprobs, pairwise_reward_loss
from fastrlhf.ops._registry import BACKEND

D, V = 24, 700
LENGTHS = (9, 4, 30, 1, 0, 12, 3, 3, 40, 60)  # five pairs
T = sum(LENGTHS)


def bounds(lengths=LENGTHS):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(dtype=torch.float32, lengths=LENGTHS):
    """hidden, weight, bias, targets, cu_seqlens and ref_logprobs near the policy's own."""
    num_rows = sum(lengths)
    hidden, weight, bias = torch.randn(num_rows, D).to(dtype), (torch.randn(V, D) / 3).to(dtype), torch.randn(V)
    targets = torch.randint(V, (num_rows,))
    own = linear_token_logprobs(hidden, weight, targets, bias=bias.to(dtype))
    return hidden, weight, bias.to(dtype), targets, bounds(lengths), own + 0.3 * torch.randn_like(own)


def ours(hidden, weight, bias, targets, cu_seqlens, ref, **options):
    return linear_dpo_loss(hidden, weight, targets, cu_seqlens, ref, bias=bias, **options)


def written_out(hidden, weight, bias, targets, cu_seqlens, ref, *, mask=None, beta=0.1, label_smoothing=0.0):
    """(loss, stats) from the paper's formula on whole logits, in float64, a pair at a time."""
    table = F.linear(hidden.double(), weight.double(), bias.double()).log_softmax(-1)
    logprobs, ref = table[torch.arange(len(targets)), targets], ref.double()
    kept = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    ends, rows = cu_seqlens.tolist(), []
    for i in range(0, len(ends) - 1, 2):
        chosen, rejected = (torch.arange(*ends[j : j + 2]) for j in (i, i + 1))
        chosen, rejected = chosen[kept[chosen]], rejected[kept[rejected]]
        rewards = [beta * (logprobs[side].sum() - ref[side].sum()) for side in (chosen, rejected)]
        h = rewards[0] - rewards[1]
        loss = -(1 - label_smoothing) * torch.log(torch.sigmoid(h)) - label_smoothing * torch.log(1 - torch.sigmoid(h))
        accuracy = 0.5 if h == 0 else float(h > 0)
        rows.append([loss, torch.tensor(accuracy), h, *rewards, logprobs[chosen].sum(), logprobs[rejected].sum()])
    loss, *stats = (torch.stack(column).double().mean() for column in zip(*rows, strict=True))
    return loss, dict(
        zip(("accuracy", "margin", "chosen", "rejected", "chosen_logprobs", "rejected_logprobs"), stats, strict=True)
    )


def gradients(function, args, upstream=1.0, **options):
    leaves = [t.detach().clone().requires_grad_() for t in args[:3]]
    loss, stats = function(*leaves, *args[3:], **options)
    return loss.detach(), stats, torch.autograd.grad(upstream * loss, leaves)


@pytest.mark.parametrize("chunk_size", [1, 16, 45, 512])  # of pairs alone, together, and longer than a chunk
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"beta": 0.7}, {"label_smoothing": 0.2}], ids=range(3))
def test_it_is_dpo_on_the_whole_logits_with_any_upstream_gradient(options, masked, chunk_size):
    args, mask = inputs(), (torch.rand(T) < 0.6) if masked else None
    expected, expected_stats, exact = gradients(written_out, args, 3.0, mask=mask, **options)
    loss, stats, grads = gradients(ours, args, 3.0, mask=mask, chunk_size=chunk_size, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert set(stats) == set(expected_stats)
    for name, value in stats.items():
        torch.testing.assert_close(value.double(), expected_stats[name].detach(), rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(grads, exact, strict=True):
        torch.testing.assert_close(actual.double(), wanted.double(), rtol=2e-5, atol=2e-6)


def test_it_is_the_reward_models_loss_on_the_implied_rewards():
    hidden, weight, bias, targets, cu_seqlens, ref = inputs()

    def joined(hidden, weight, bias, targets, cu_seqlens, ref):
        log_ratio = linear_token_logprobs(hidden, weight, targets, bias=bias) - ref
        rewards = torch.stack([0.1 * part.sum() for part in log_ratio.split(list(LENGTHS))])
        return pairwise_reward_loss(rewards[::2], rewards[1::2], label_smoothing=0.1)

    args = hidden, weight, bias, targets, cu_seqlens, ref
    expected, actual = gradients(joined, args), gradients(ours, args, label_smoothing=0.1)
    torch.testing.assert_close(actual[0], expected[0])
    for name, value in expected[1].items():
        torch.testing.assert_close(actual[1][name], value)
    for mine, theirs in zip(actual[2], expected[2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_policy_that_is_the_reference_has_loss_log_2():
    hidden, weight, bias, targets, cu_seqlens, _ = inputs(torch.float64)
    ref = linear_token_logprobs(hidden, weight, targets, bias=bias)
    loss, stats = ours(hidden, weight, bias, targets, cu_seqlens, ref)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert stats["accuracy"] == 0.5 and stats["margin"] == 0


def test_the_loss_stays_finite_for_margins_of_thousands():
    hidden, weight, bias, targets, cu_seqlens, ref = inputs(torch.float64, lengths=(20, 20))
    for side, exact in ((1, 0.0), (-1, 1.0)):
        shift = side * 200.0 * torch.where(torch.arange(40) < 20, -1, 1)
        loss, stats = ours(hidden, weight, bias, targets, cu_seqlens, ref + shift, beta=1.0)
        assert loss.item() == pytest.approx(exact * -stats["margin"].item(), abs=1e-12)
        assert abs(stats["margin"]) > 7000


def test_masked_rows_are_not_looked_at():
    args, mask = list(inputs()), torch.rand(T) < 0.5
    clean = gradients(ours, args, mask=mask)
    for i in (0, 5):
        args[i] = args[i].clone()
        args[i][~mask] = torch.nan
    args[3] = args[3].masked_fill(~mask, -100)
    loss, stats, grads = gradients(ours, args, mask=mask)
    assert torch.equal(loss, clean[0]) and all(torch.equal(stats[name], clean[1][name]) for name in stats)
    assert all(torch.equal(a, b) for a, b in zip(grads, clean[2], strict=True)) and not grads[0][~mask].any()


@pytest.mark.parametrize("lengths", [(), (0, 0), (3, 2)])
def test_nothing_to_count_has_no_gradient(lengths):
    args = inputs(lengths=lengths)
    loss, stats, grads = gradients(ours, args, mask=torch.zeros(sum(lengths), dtype=torch.bool))
    assert loss.item() == pytest.approx(math.log(2) if lengths else 0.0) and not any(g.any() for g in grads)
    assert stats.pop("accuracy") == (0.5 if lengths else 0) and not any(stats.values())


def test_micro_batches_with_the_global_count_add_up():
    args = inputs()
    whole, cut = gradients(ours, args), int(args[4][4])
    hidden, weight, bias, targets, cu_seqlens, ref = args
    parts = [
        gradients(ours, (hidden[s], weight, bias, targets[s], cu, ref[s]), denominator=5)
        for s, cu in ((slice(0, cut), cu_seqlens[:5]), (slice(cut, None), cu_seqlens[4:] - cut))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    torch.testing.assert_close(torch.cat([part[2][0] for part in parts]), whole[2][0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(parts[0][2][1] + parts[1][2][1], whole[2][1], rtol=1e-5, atol=1e-6)
    for name, value in whole[1].items():
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], value)


@pytest.mark.parametrize("position", [0, 5], ids=["hidden", "ref_logprobs"])
def test_nan_in_a_row_that_counts_is_shown(position):
    args = [a.clone() for a in inputs()]
    args[position][3] = torch.nan
    loss, stats = ours(*args)
    assert loss.isnan() and stats["margin"].isnan() and stats["accuracy"].isnan() and not stats["rejected"].isnan()


def test_bfloat16_gradients_are_rounded_once():
    args = inputs(torch.bfloat16)
    loss, _, grads = gradients(ours, args, chunk_size=16)
    expected, _, exact = gradients(written_out, [a.double() if a.is_floating_point() else a for a in args])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for actual, wanted in zip(grads, exact, strict=True):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.double(), wanted, rtol=2**-8, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(("trained", "products"), [((), 1), (("hidden",), 2), (("hidden", "weight"), 3)])
@pytest.mark.parametrize(("chunk_size", "more"), [(512, 0), (20, 1)])
def test_a_pair_that_fits_in_a_chunk_costs_a_product_and_one_for_each_gradient(trained, products, chunk_size, more):
    args = inputs(lengths=(20, 20))
    for name, tensor in zip(("hidden", "weight"), args, strict=False):
        tensor.requires_grad_(name in trained)
    with profile() as recorded:
        loss, _ = ours(*args, chunk_size=chunk_size)
        if trained:
            loss.backward()
    made = sum(event.name in ("aten::mm", "aten::addmm_") for event in recorded.function_events)
    assert made == (products + more if trained else 1) * (40 // min(chunk_size, 40))


def test_memory_is_that_of_a_chunk_beyond_the_gradients():
    num_rows, width, size, chunk_size = 512, 16, 5000, 16
    hidden, weight = (torch.randn(n, width, requires_grad=True) for n in (num_rows, size))
    targets, chunk = torch.randint(size, (num_rows,)), chunk_size * size * 4
    cu_seqlens, ref = bounds([64] * 6 + [8] * 16), torch.randn(num_rows)

    def forward_and_backward():
        loss, _ = linear_dpo_loss(hidden, weight, targets, cu_seqlens, ref, chunk_size=chunk_size)
        return torch.autograd.grad(3 * loss, (hidden, weight))

    grads, small = (num_rows + size) * width * 4, 64 * num_rows * 4 + 2 * chunk_size * width * 4
    copies = 1 if BACKEND == "native" else 9  # the reference makes a few more tensors of the size of a chunk
    assert peak_bytes(forward_and_backward) <= copies * chunk + grads + small
    assert copies * chunk + small < num_rows * size * 4 / 2


GOOD = {
    "hidden": torch.zeros(3, 4),
    "weight": torch.zeros(5, 4),
    "targets": torch.zeros(3, dtype=torch.int64),
    "cu_seqlens": torch.tensor([0, 2, 3], dtype=torch.int32),
    "ref_logprobs": torch.zeros(3),
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight": torch.zeros(4, 5)}, ValueError, "weight must be (V, D) = (*, 4), got (4, 5)"),
        ({"targets": torch.tensor([0, 5, 1])}, ValueError, "targets must be in [0, 5), got values from 0 to 5"),
        ({"cu_seqlens": torch.tensor([0, 3]).int()}, ValueError, "cu_seqlens must be (2N + 1,), got (2,)"),
        ({"cu_seqlens": torch.tensor([0, 2, 1]).int()}, ValueError, "cu_seqlens must rise from 0 to 3, got [0, 2, 1]"),
        ({"cu_seqlens": torch.tensor([0, 2, 3])}, TypeError, "cu_seqlens must be int32, got int64"),
        ({"ref_logprobs": torch.zeros(2)}, ValueError, "ref_logprobs must be (T,) = (3,), got (2,)"),
        ({"ref_logprobs": torch.zeros(3).double()}, TypeError, "ref_logprobs must be float32, got float64"),
        ({"ref_logprobs": torch.zeros(3, requires_grad=True)}, ValueError, "ref_logprobs gets no gradient"),
        ({"ref_logprobs": torch.zeros(3, device="meta")}, ValueError, "must be on one device"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be bool, got float32"),
        ({"beta": 0.0}, ValueError, "beta must be above 0 and finite, got 0.0"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be in [0, 1], got -0.1"),
        ({"denominator": -3}, ValueError, "denominator must be positive and finite, got -3"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error) as caught:
        weight = {"weight": GOOD["weight"].clone().requires_grad_()} if "gets no gradient" in text else {}
        linear_dpo_loss(**{**GOOD, **weight, **change})
    assert "linear_dpo_loss: " in str(caught.value) and text in str(caught.value)
