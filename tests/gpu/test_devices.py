"""Tensors of several devices are refused by name; what only values show is as documented, as nothing looks at them."""

import pytest
import torch
from compare import filled
from torch import Tensor

from fastrlhf import (
    linear_cross_entropy,
    linear_dpo_loss,
    linear_kl_divergence,
    linear_ppo_loss,
    linear_token_logprobs,
    sample_tokens,
    token_logprobs,
)
from fastrlhf.ops._registry import OPS

LINEAR = {
    linear_cross_entropy: ("hidden", "weight", "targets"),
    linear_dpo_loss: ("hidden", "weight", "targets", "cu_seqlens", "ref_logprobs"),
    linear_kl_divergence: ("hidden_p", "weight_p", "hidden_q", "weight_q"),
    linear_ppo_loss: ("hidden", "weight", "targets", "old_logprobs", "advantages"),
    linear_token_logprobs: ("hidden", "weight", "targets"),
}


@pytest.fixture(params=["cpu", "cuda:1"])
def elsewhere(request):
    if request.param == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    return request.param


@pytest.mark.parametrize("name", [name for name in OPS if not name.startswith("linear_")])
def test_a_tensor_elsewhere_is_refused(name, device, elsewhere):
    for args in filled(OPS[name].samples(device, torch.float32)):
        places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        for i in filled(places if len(places) > 1 else []):
            mixed = [a.to(elsewhere) if i == j else a for j, a in enumerate(args)]
            with pytest.raises(ValueError, match="must be on one device"):
                OPS[name](*mixed)


@pytest.mark.parametrize("function", LINEAR, ids=lambda function: function.__name__)
def test_a_tensor_elsewhere_is_refused_by_ops_on_a_head(function, device, elsewhere):
    good = {
        **{name: torch.randn(4, 8, device=device) for name in ("hidden", "hidden_p", "hidden_q")},
        **{name: torch.randn(5, 8, device=device) for name in ("weight", "weight_p", "weight_q")},
        "targets": torch.tensor([0, 4, 1, 2], device=device),
        "cu_seqlens": torch.tensor([0, 2, 4], device=device, dtype=torch.int32),
        **{name: torch.randn(4, device=device) for name in ("ref_logprobs", "old_logprobs", "advantages")},
    }
    good = {name: good[name] for name in LINEAR[function]}
    function(**good)
    for name, tensor in good.items():
        with pytest.raises(ValueError, match="must be on one device"):
            function(**{**good, name: tensor.to(elsewhere)})


def test_a_target_out_of_range_gives_nan_for_its_row_and_its_gradient(device):
    hidden, weight = torch.randn(5, 16, device=device), torch.randn(300, 16, device=device)
    targets = torch.tensor([7, -1, 300, 2**40, 299], device=device)
    broken = torch.tensor([False, True, True, True, False], device=device)
    logits = (hidden @ weight.t()).requires_grad_()
    for logprobs in (token_logprobs(logits, targets), linear_token_logprobs(hidden, weight, targets)):
        assert torch.equal(logprobs.isnan(), broken)
    (grad,) = torch.autograd.grad(token_logprobs(logits, targets).sum(), logits)
    assert torch.equal(grad.isnan().all(1), broken) and torch.equal(grad.isnan().any(1), broken)


def test_a_row_without_a_distribution_draws_token_0_with_logprob_nan(device):
    logits = torch.randn(4, 3000, device=device)
    logits[1, 7], logits[2, 8], logits[3] = torch.nan, torch.inf, -torch.inf
    for options in ({}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}):
        tokens, *logprobs = sample_tokens(logits, **options)
        assert tokens[1:].tolist() == [0, 0, 0] and 0 <= tokens[0] < 3000
        for found in logprobs:
            assert found.isnan().tolist() == [False, True, True, True]
