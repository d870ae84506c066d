"""Our replacements against OpenRLHF's originals: outputs, dtypes and gradients, in and out of what our ops cover."""

import functools
import importlib.util
import inspect

import pytest
import torch
from compare import filled

import fastrlhf
from fastrlhf.integrations import PEERS
from fastrlhf.integrations._replacing import _find, same

if importlib.util.find_spec("openrlhf") is None:
    pytest.skip("OpenRLHF is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def pairs():
    """name -> (OpenRLHF's, ours)."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        originals = {replacement.path: _find(replacement.path) for replacement in PEERS["openrlhf"]}
        with fastrlhf.patch("openrlhf") as done:
            assert set(done.replaced) == set(originals), done
            found = {path.split(":")[1].split(".")[-1]: (originals[path], _find(path)) for path in originals}
    assert all(_find(path) is original for path, original in originals.items())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 7), (2, 9, 4099)])
def test_log_probs_and_entropies_are_openrlhfs(pairs, shape, temperature, dtype):
    logits = (4 * torch.randn(shape)).to(dtype).requires_grad_()
    same(*pairs["log_probs_from_logits"], (logits, torch.randint(shape[-1], shape[:-1]), temperature))
    same(*pairs["compute_entropy"], (logits,))


def test_an_entropy_taken_before_has_a_gradient_at_any_temperature(pairs):
    logits = torch.randn(2, 3, 20, requires_grad=True)
    scores = logits * 1.0
    entropy = pairs["compute_entropy"][1](scores)
    logprobs = pairs["log_probs_from_logits"][1](scores, torch.randint(20, (2, 3)), 0.5)
    (entropy.sum() + logprobs.sum()).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_are_openrlhfs_clamps_included(pairs, estimator):
    logprobs = (-6 * torch.rand(4, 30)).requires_grad_()
    base = (-6 * torch.rand(4, 30)).requires_grad_()
    half = logprobs.bfloat16().detach().requires_grad_()
    kls = [functools.partial(function, kl_estimator=estimator) for function in pairs["compute_approx_kl"]]
    for arguments in ((logprobs, base), (half, base), (logprobs, base[:1])):
        same(*kls, arguments)
    if "unbiased_gradient" in inspect.signature(pairs["compute_approx_kl"][0]).parameters:
        far = (60 * logprobs.detach()).requires_grad_()  # where exp overflows
        for unbiased in (False, True):
            same(*pairs["compute_approx_kl"], (far, base, None, estimator, unbiased))
            same(*pairs["compute_approx_kl"], (logprobs, base, base.detach(), estimator, unbiased))


def test_an_unknown_kl_estimator_raises_as_in_openrlhf(pairs):
    for function in filled(pairs["compute_approx_kl"]):
        with pytest.raises(ValueError, match="Unknown kl_estimator: k4"):
            function(torch.zeros(2), torch.zeros(2), kl_estimator="k4")


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (1.2, 0.95)])
@pytest.mark.parametrize("shape", [(2, 3), (8, 33), (5, 257)])
def test_advantages_and_returns_are_openrlhfs_in_gaps_too(pairs, shape, gamma, lam):
    rewards, values = torch.randn(2, *shape)
    mask = (torch.rand(shape) < 0.7).long()
    mask[0] = 0
    for kept in (mask, mask.bool(), mask.float(), mask * 0.5, None):
        same(*pairs["get_advantages_and_returns"], (None, values, rewards, kept, gamma, lam))
        same(*pairs["get_cumulative_returns"], (None, rewards, kept, gamma))
