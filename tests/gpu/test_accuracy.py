"""What tensor cores do to log-probabilities under a head."""

import pytest
import torch

from fastrlhf import linear_token_logprobs


@pytest.mark.parametrize("width", [576, 4096])
def test_linear_token_logprobs_of_bf16_are_those_of_float64(width, device):
    hidden = torch.randn(1024, width, device=device).bfloat16()
    weight = (2 * width**-0.5 * torch.randn(128_256, width, device=device)).bfloat16()  # logits of deviation 2
    targets = torch.randint(weight.shape[0], (len(hidden),), device=device)
    logprobs, entropy = linear_token_logprobs(hidden, weight, targets, return_entropy=True)
    table = (hidden.double() @ weight.double().t()).log_softmax(-1)
    exact = table.gather(1, targets[:, None])[:, 0]
    assert (logprobs - exact).abs().mean() <= 1e-5
    assert (entropy + (table.exp() * table).sum(-1)).abs().mean() <= 1e-5
