"""What is no tensor, or no number, is named by the function that got it, and by the argument."""

import math

import numpy as np
import pytest
import torch

import fastrlhf
from fastrlhf import gae, linear_token_logprobs, sample_tokens, token_logprobs, value_loss

V, X = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([[0.5, -1.0], [2.0, 0.0]])
T, CU = torch.tensor([0, 1]), torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: value_loss(None, V, V), "value_loss: values must be a tensor, got NoneType"),
        (lambda: value_loss(V, [0.5, -1.0, 2.0], V), "value_loss: old_values must be a tensor, got list"),
        (lambda: value_loss(V, V, np.ones(3)), "value_loss: returns must be a tensor, got ndarray"),
        (lambda: value_loss(V, V, V, "x"), "value_loss: mask must be a tensor or None, got str"),
        (lambda: value_loss(V, V, V, clip_range="0.2"), "value_loss: clip_range must be a number or None, got str"),
        (lambda: value_loss(V.to_sparse(), V, V), "value_loss: values must be a dense tensor, got torch.sparse_coo"),
        (lambda: token_logprobs(X.to(torch.float8_e4m3fn), T), "token_logprobs: logits must not be of 8 bits"),
        (lambda: token_logprobs(X, T, temperature=None), "temperature must be a number or a tensor, got NoneType"),
        (
            lambda: token_logprobs(X, T, temperature=torch.tensor(2)),
            "temperature must be floating-point, got torch.int64",
        ),
        (lambda: linear_token_logprobs(X, X, T, chunk_size=1.5), "chunk_size must be an integer, got float"),
        (lambda: sample_tokens(X, top_k=2.5), "sample_tokens: top_k must be an integer, got float"),
        (lambda: sample_tokens(X, seeds=[1, 2]), "sample_tokens: seeds must be a tensor or None, got list"),
        (lambda: gae(V, V, [0, 3]), "gae: cu_seqlens must be a tensor, got list"),
        (lambda: gae(V, V, CU, gamma=torch.ones(2)), "gae: gamma must be a number, got Tensor"),
        (lambda: gae(V, V, CU, lam=None), "gae: lam must be a number, got NoneType"),
    ],
)
def test_the_argument_of_a_wrong_kind_is_named(call, text):
    with pytest.raises(TypeError) as caught:
        call()
    assert text in str(caught.value) and str(caught.value).partition(": ")[0] in fastrlhf.ops.__all__


def test_numbers_out_of_range_are_named():
    with pytest.raises(ValueError, match="value_loss: denominator must be positive and finite, got inf"):
        value_loss(V, V, V, denominator=math.inf)
    query, cache, length = torch.randn(1, 1, 2), torch.randn(1, 1, 2, 2), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="decode_attention: scale must be finite or None, got nan"):
        fastrlhf.decode_attention(query, cache, cache, length, scale=math.nan)


def test_a_tensor_of_one_temperature_is_that_number():
    for given in (torch.tensor(2.0), torch.tensor([2.0], dtype=torch.float64)):
        assert torch.equal(token_logprobs(X, T, temperature=given), token_logprobs(X, T, temperature=2.0))
        assert torch.equal(
            linear_token_logprobs(X, X, T, temperature=given), linear_token_logprobs(X, X, T, temperature=2.0)
        )


def test_other_errors_stay_as_they_are():
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        value_loss(V)
    with pytest.raises(ValueError, match="old_values"):
        value_loss(V, V[:2], V)
