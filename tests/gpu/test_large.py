"""Tensors of more than 2^31 elements: offsets do not overflow. Some need up to 40 GB."""

import pytest
import torch

from fastrlhf import approx_kl, decode_attention, kl_divergence, sample_tokens, token_logprobs, value_loss

ROWS, SIZE = 9000, 256_000
AT = [0, 8388, 8389, 8999]  # element 2^31 is in row 8388
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def room(gpu):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 44e9:
        pytest.skip("needs 44 GB of free GPU memory")
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def logits(room, device):
    assert ROWS * SIZE > 2**31 and AT[1] * SIZE < 2**31 < AT[2] * SIZE
    return torch.randn(ROWS, SIZE, device=device, dtype=BF16)


def test_token_logprobs_and_its_gradient_in_place_are_those_of_float64(logits, device):
    targets = torch.randint(SIZE, (ROWS,), device=device)
    g, h = torch.randn(2, ROWS, device=device)
    rows = logits[AT].double().requires_grad_()
    table = rows.log_softmax(-1)
    exact = table.gather(1, targets[AT, None])[:, 0], -(table.exp() * table).sum(-1)
    (exact_grad,) = torch.autograd.grad(exact, rows, [g[AT].double(), h[AT].double()])
    leaf = logits.requires_grad_()
    copy = leaf.clone()
    outputs = token_logprobs(copy, targets, return_entropy=True, inplace_backward=True)
    (grad,) = torch.autograd.grad(outputs, leaf, [g, h])
    assert grad.data_ptr() == copy.data_ptr()
    for output, expected in zip(outputs, exact, strict=True):
        torch.testing.assert_close(output[AT].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[AT].double(), exact_grad, rtol=2**-7, atol=1e-9)  # rounded to bfloat16


def test_kl_divergence_and_its_gradients_of_a_row_are_those_it_has_alone(logits, device):
    p, q = logits.requires_grad_(), torch.randn_like(logits).requires_grad_()
    g = torch.rand(ROWS, device=device) + 0.5
    divergence = kl_divergence(p, q)
    grads = torch.autograd.grad(divergence, (p, q), g)
    alone = [x.detach()[AT].requires_grad_() for x in (p, q)]
    expected = kl_divergence(*alone)
    torch.testing.assert_close(divergence[AT], expected, rtol=0, atol=0)
    for grad, exact in zip(grads, torch.autograd.grad(expected, alone, g[AT]), strict=True):
        torch.testing.assert_close(grad[AT], exact, rtol=0, atol=0)


def test_sample_tokens_draws_of_a_row_what_it_draws_alone(logits, device):
    seeds = torch.randint(2**62, (ROWS,), device=device)
    drawn = sample_tokens(logits, seeds=seeds, top_k=1000, top_p=0.9)
    for found, alone in zip(drawn, sample_tokens(logits[AT], seeds=seeds[AT], top_k=1000, top_p=0.9), strict=True):
        torch.testing.assert_close(found[AT], alone, rtol=0, atol=0)


def test_decode_attention_reads_the_last_slot_of_a_large_cache(device):
    slots, heads, length, width = 17, 8, 131_072, 128
    assert slots * heads * length * width > 2**31
    keys, values = (torch.randn(slots, heads, length, width, device=device, dtype=BF16) for _ in range(2))
    query = torch.randn(slots, 4 * heads, width, device=device, dtype=BF16)
    lengths = torch.full((slots,), length, device=device, dtype=torch.int32)
    found = decode_attention(query, keys, values, lengths)[-1]
    scores = query[-1].double().view(heads, 4, width) @ keys[-1].double().transpose(1, 2)
    exact = (scores * width**-0.5).softmax(-1) @ values[-1].double()
    torch.testing.assert_close(found.double(), exact.view(4 * heads, width), rtol=2**-6, atol=2e-4)


def test_the_last_of_more_than_2_to_the_31_tokens_count(device):
    count, last = 2**31 + 5000, 3000
    x, y = (torch.randn(count, device=device) for _ in range(2))
    found = approx_kl(x, y, estimator="k3")[-last:].clone()
    alone = approx_kl(x[-last:].clone(), y[-last:].clone(), estimator="k3")
    torch.testing.assert_close(found, alone, rtol=0, atol=0)
    x[:-last] = y[:-last] = 0  # so that all of the loss is at the end
    leaf = x.requires_grad_()
    loss, _ = value_loss(leaf, x.detach(), y, clip_range=None, denominator=1.0)
    (grad,) = torch.autograd.grad(loss, leaf)
    error = (x.detach()[-last:] - y[-last:]).double()
    torch.testing.assert_close(loss.double(), error.square().sum() / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[-last:].double(), error, rtol=1e-6, atol=1e-6)
    assert not grad[:-last].any()
