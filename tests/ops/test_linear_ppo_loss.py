"""linear_ppo_loss against PPO written out on whole float64 logits, and its promises about memory and work."""

import sys

import pytest
import torch
import torch.nn.functional as F
from compare import peak_bytes
from torch.autograd.profiler import profile
from torch.distributions import Categorical, kl_divergence

from fastrlhf import linear_ppo_loss, linear_token_logprobs, ppo_policy_loss
from fastrlhf.ops._registry import BACKEND

T, D, V = 60, 24, 700


def inputs(dtype=torch.float32, *, num_rows=T, temperature=1.0):
    """hidden, weight, bias, targets, and old_logprobs, advantages, ref_logprobs near the policy's own."""
    hidden, weight, bias = torch.randn(num_rows, D).to(dtype), (torch.randn(V, D) / 3).to(dtype), torch.randn(V)
    targets = torch.randint(V, (num_rows,))
    own = linear_token_logprobs(hidden, weight, targets, bias=bias.to(dtype), temperature=temperature)
    old, advantages, ref = own + 0.3 * torch.randn_like(own), torch.randn_like(own), own + torch.randn_like(own)
    return hidden, weight, bias.to(dtype), targets, old, advantages, ref


def ours(hidden, weight, bias, targets, old, advantages, ref, **options):
    return linear_ppo_loss(hidden, weight, targets, old, advantages, bias=bias, ref_logprobs=ref, **options)


def written_out(hidden, weight, bias, targets, old, advantages, ref, *, mask=None, clip=(0.2, 0.2), **options):
    """(loss, stats) from the paper's formulas on whole logits, in float64, a row at a time."""
    temperature = torch.as_tensor(options.get("temperature", 1.0), dtype=torch.float64).expand(targets.shape)
    policy = Categorical(logits=F.linear(hidden.double(), weight.double(), bias.double()) / temperature[:, None])
    kept = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    logprobs, old, advantages, ref = (x.double()[kept] for x in (policy.log_prob(targets), old, advantages, ref))
    ratio = torch.exp(logprobs - old)
    surrogates = ratio * advantages, ratio.clip(1 - clip[0], 1 + clip[1]) * advantages
    clipped, held = torch.minimum(*surrogates), surrogates[1] < surrogates[0]
    if "dual_clip" in options:
        over = (advantages < 0) & (ratio > options["dual_clip"])
        clipped, held = torch.where(over, options["dual_clip"] * advantages, clipped), held | over
    r = ref - logprobs
    kl = {"k1": -r, "k2": r**2 / 2, "k3": r.exp() - 1 - r}[options.get("kl_estimator", "k2")]
    stats = {
        "policy_loss": -clipped.mean(),
        "entropy": policy.entropy()[kept].mean(),
        "kl": kl.mean(),
        "clip_fraction": held.double().mean(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "ratio": ratio.mean(),
        "ratio_max": ratio.max(),
        "ratio_min": ratio.min(),
    }
    terms = options.get("kl_coef", 0.0) * stats["kl"] - options.get("entropy_coef", 0.0) * stats["entropy"]
    return stats["policy_loss"] + terms, stats


def gradients(function, args, upstream=1.0, **options):
    leaves = [t.detach().clone().requires_grad_() for t in args[:3]]
    loss, stats = function(*leaves, *args[3:], **options)
    return loss.detach(), stats, torch.autograd.grad(upstream * loss, leaves)


OPTIONS = [
    {},
    {"entropy_coef": 0.05, "temperature": 0.7},
    {"dual_clip": 1.35},
    {"kl_coef": 0.3},
    {"kl_coef": 0.3, "kl_estimator": "k1", "entropy_coef": 0.01},
    {"kl_coef": 0.3, "kl_estimator": "k3", "temperature": torch.linspace(0.5, 2.0, T)},
]


@pytest.mark.parametrize("chunk_size", [1, 7, 512])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_it_is_ppo_on_the_whole_logits_with_any_upstream_gradient(options, masked, chunk_size):
    args = inputs(temperature=options.get("temperature", 1.0))
    mask = (torch.rand(T) < 0.6) if masked else None
    expected, expected_stats, exact = gradients(written_out, args, 3.0, mask=mask, clip=(0.2, 0.3), **options)
    loss, stats, grads = gradients(ours, args, 3.0, mask=mask, clip_range=(0.2, 0.3), chunk_size=chunk_size, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert set(stats) == set(expected_stats)
    for name, value in stats.items():
        torch.testing.assert_close(value.double(), expected_stats[name].detach(), rtol=1e-5, atol=1e-6)
    for actual, wanted in zip(grads, exact, strict=True):
        torch.testing.assert_close(actual.double(), wanted.double(), rtol=2e-5, atol=2e-6)


def test_it_is_the_two_ops_that_it_joins():
    hidden, weight, bias, targets, old, advantages, _ = inputs()
    mask = torch.rand(T) < 0.6

    def joined(hidden, weight, bias):
        logprobs, entropy = linear_token_logprobs(hidden, weight, targets, bias=bias, return_entropy=True)
        loss, stats = ppo_policy_loss(logprobs, old, advantages, mask)
        return loss - 0.1 * entropy[mask].mean(), stats

    def fused(hidden, weight, bias):
        return linear_ppo_loss(
            hidden, weight, targets, old, advantages, bias=bias, mask=mask, entropy_coef=0.1, chunk_size=16
        )

    expected, actual = (gradients(f, (hidden, weight, bias)) for f in (joined, fused))
    torch.testing.assert_close(actual[0], expected[0])
    assert set(actual[1]) - set(expected[1]) == {"policy_loss", "entropy"}
    for name, value in expected[1].items():
        torch.testing.assert_close(actual[1][name], value)
    for ours, theirs in zip(actual[2], expected[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_mean_gradient_of_k2_over_the_policys_samples_is_that_of_the_kl():
    weight, hidden, ref = torch.randn(5, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64), torch.randn(3, 5)
    ref = ref.double().log_softmax(-1)
    leaf = weight.clone().requires_grad_()
    exact = kl_divergence(Categorical(logits=hidden @ leaf.t()), Categorical(logits=ref)).sum()
    (expected,) = torch.autograd.grad(exact, leaf)
    total = 0
    probs = (hidden @ weight.t()).softmax(-1)
    for token in range(5):  # every sample, weighted by its probability through one upstream gradient a row
        targets = torch.full((3,), token)
        for row in range(3):
            mask = torch.arange(3) == row
            zeros = torch.zeros(3, dtype=torch.float64)
            loss, _ = linear_ppo_loss(
                hidden, leaf, targets, zeros, zeros, ref_logprobs=ref[:, token], mask=mask, kl_coef=1.0
            )
            total = total + probs[row, token] * torch.autograd.grad(loss, leaf)[0]
    torch.testing.assert_close(total, expected)


def test_masked_rows_are_not_looked_at():
    args = list(inputs())
    mask = torch.rand(T) < 0.5
    options = {"mask": mask, "kl_coef": 0.1, "entropy_coef": 0.1}
    clean = gradients(ours, args, **options)
    for i in (0, 4, 5, 6):
        args[i] = args[i].clone()
        args[i][~mask] = torch.nan
    args[3] = args[3].masked_fill(~mask, -100)
    loss, stats, grads = gradients(ours, args, **options)
    assert torch.equal(loss, clean[0]) and all(torch.equal(stats[name], clean[1][name]) for name in stats)
    assert all(torch.equal(a, b) for a, b in zip(grads, clean[2], strict=True)) and not grads[0][~mask].any()


@pytest.mark.parametrize("num_rows", [0, 4])
def test_nothing_to_count_gives_0_that_can_be_differentiated(num_rows):
    args = inputs(num_rows=num_rows)
    loss, stats, grads = gradients(ours, args, mask=torch.zeros(num_rows, dtype=torch.bool), kl_coef=0.1)
    assert loss == 0 and not any(stats.values()) and not any(g.any() for g in grads)


def test_micro_batches_with_the_global_count_add_up():
    args, mask = inputs(), torch.rand(T) < 0.7
    whole = gradients(ours, args, mask=mask, entropy_coef=0.1)
    parts = [
        gradients(
            ours,
            (args[0][s], *args[1:3], *(x[s] for x in args[3:])),
            mask=mask[s],
            entropy_coef=0.1,
            denominator=int(mask.sum()),
        )
        for s in (slice(0, 23), slice(23, None))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    torch.testing.assert_close(parts[0][2][1] + parts[1][2][1], whole[2][1], rtol=1e-5, atol=1e-6)
    for name in ("policy_loss", "entropy", "kl", "clip_fraction", "approx_kl", "ratio"):
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], whole[1][name])


@pytest.mark.parametrize("position", [0, 4, 5, 6], ids=["hidden", "old_logprobs", "advantages", "ref_logprobs"])
def test_nan_in_a_row_that_counts_is_shown(position):
    args = [a.clone() for a in inputs()]
    args[position][3] = torch.nan
    assert ours(*args, kl_coef=0.1)[0].isnan()


def test_bfloat16_gradients_are_rounded_once():
    args = inputs(torch.bfloat16)
    options = {"entropy_coef": 0.05, "kl_coef": 0.1}
    loss, _, grads = gradients(ours, args, chunk_size=16, **options)
    expected, _, exact = gradients(written_out, [a.double() if a.is_floating_point() else a for a in args], **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for actual, wanted in zip(grads, exact, strict=True):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.double(), wanted, rtol=2**-8, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(("trained", "products"), [((), 1), (("hidden",), 2), (("hidden", "weight"), 3)])
def test_only_what_needs_a_gradient_costs_a_product(trained, products):
    args = inputs()
    for name, tensor in zip(("hidden", "weight"), args, strict=False):
        tensor.requires_grad_(name in trained)
    with profile() as recorded:
        loss, _ = ours(*args, entropy_coef=0.1)
        if trained:
            loss.backward()
    assert sum(event.name in ("aten::mm", "aten::addmm_") for event in recorded.function_events) == products


def test_memory_is_that_of_a_chunk_beyond_the_gradients():
    num_rows, width, size, chunk_size = 512, 16, 5000, 16
    hidden, weight = (torch.randn(n, width, requires_grad=True) for n in (num_rows, size))
    targets, rows, chunk = torch.randint(size, (num_rows,)), torch.randn(3, num_rows), chunk_size * size * 4

    def forward_and_backward():
        loss, _ = linear_ppo_loss(
            hidden, weight, targets, *rows[:2], ref_logprobs=rows[2], entropy_coef=0.1, chunk_size=chunk_size
        )
        return torch.autograd.grad(3 * loss, (hidden, weight))

    grads, small = (num_rows + size) * width * 4, 64 * num_rows * 4 + 2 * chunk_size * width * 4
    copies = 1 if BACKEND == "native" else 9  # the reference makes a few more tensors of the size of a chunk
    assert peak_bytes(forward_and_backward) <= copies * chunk + grads + small
    assert copies * chunk + small < num_rows * size * 4 / 2


GOOD = {
    "hidden": torch.zeros(3, 4),
    "weight": torch.zeros(5, 4),
    "targets": torch.zeros(3, dtype=torch.int64),
    "old_logprobs": torch.zeros(3),
    "advantages": torch.zeros(3),
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight": torch.zeros(4, 5)}, ValueError, "weight must be (V, D) = (*, 4), got (4, 5)"),
        ({"targets": torch.tensor([0, 5, 1])}, ValueError, "targets must be in [0, 5), got values from 0 to 5"),
        ({"old_logprobs": torch.zeros(2)}, ValueError, "old_logprobs must be (T,) = (3,), got (2,)"),
        ({"advantages": torch.zeros(3).double()}, TypeError, "advantages must be float32, got float64"),
        ({"ref_logprobs": torch.zeros(3, 1)}, ValueError, "ref_logprobs must be (T,) = (3,), got (3, 1)"),
        ({"advantages": torch.zeros(3, requires_grad=True)}, ValueError, "advantages gets no gradient"),
        ({"advantages": torch.zeros(3, device="meta")}, ValueError, "must be on one device"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be bool, got float32"),
        ({"clip_range": -0.1}, ValueError, "clip_range must be 0 <= low <= 1 and high >= 0, got (-0.1, -0.1)"),
        ({"entropy_coef": float("nan")}, ValueError, "entropy_coef must be a number from 0 up, got nan"),
        ({"kl_coef": 0.1}, ValueError, "kl_coef = 0.1 needs ref_logprobs"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator must be k1, k2, k3, got 'k4'"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature must be (3,) or (1,), got (2,)"),
        ({"denominator": -3}, ValueError, "denominator must be positive and finite, got -3"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error) as caught:
        weight = {"weight": GOOD["weight"].clone().requires_grad_()} if "gets no gradient" in text else {}
        linear_ppo_loss(**{**GOOD, **weight, **change})
    assert "linear_ppo_loss: " in str(caught.value) and text in str(caught.value)


def test_rows_of_advantage_0_give_0_though_their_ratio_overflows(monkeypatch):
    """In the op, and in the reference, whose gradients autograd makes."""
    module = sys.modules[linear_ppo_loss.__module__]
    hidden, weight, bias, targets, old, advantages, _ = inputs()
    far = torch.arange(T) % 3 == 0
    old[far], advantages[far] = -1000.0, 0.0
    given = hidden, weight, bias, targets, old, advantages, None
    some, _, expected = gradients(ours, given, denominator=T, mask=~far)
    loss, _, grads = gradients(ours, given, denominator=T)
    found = []
    monkeypatch.setattr(module, "_op", lambda *args: found.extend(module.linear_ppo_loss_ref(*args)) or found)
    ours(*(t.requires_grad_() for t in given[:3]), *given[3:], denominator=T)
    for actual, wanted in zip((loss, *grads, *found[:1], *found[2:5]), (some, *expected) * 2, strict=True):
        torch.testing.assert_close(actual, wanted)
