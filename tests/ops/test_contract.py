"""What holds for every op of the table in tests/op_matrix.py, in every dtype that it takes."""

import pytest
import torch
from compare import assert_accurate, filled, flat, to_double
from op_matrix import CASES, DIFFERENTIABLE, GRADIENT_CASES, MATRIX
from torch import Tensor

from fastrlhf.ops._registry import OPS


def arguments(name, device, dtype):
    samples = list(OPS[name].samples(device, dtype))
    assert samples
    return samples


def with_grad(name, args):
    named = zip(OPS[name].parameters, args, strict=True)
    return [a.clone().requires_grad_() if n in OPS[name].grads and isinstance(a, Tensor) else a for n, a in named]


def differentiable_sum(outputs, seed=0):
    """A scalar that weighs each differentiable output differently at each place."""
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for output in flat(outputs):
        if output.requires_grad:
            weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(
                output.device, output.dtype
            )
            total = total + (output * weights).sum()
    return total


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_forward_is_as_accurate_as_torch(name, device, dtype, poisoned):
    for i, args in filled(enumerate(arguments(name, device, dtype))):
        actual = OPS[name](*args)
        exact, plain = OPS[name].reference(*to_double(args)), OPS[name].reference(*args)
        assert_accurate(actual, exact, plain, f"{name} sample {i}")


@pytest.mark.parametrize(("name", "dtype"), GRADIENT_CASES, ids=str)
def test_gradient_is_as_accurate_as_torch(name, dtype, device, poisoned):
    for i, args in filled(enumerate(arguments(name, device, dtype))):
        results = []
        for function, inputs in (
            (OPS[name], args),
            (OPS[name].reference, to_double(args)),
            (OPS[name].reference, args),
        ):
            leaves = with_grad(name, inputs)
            total = differentiable_sum(function(*leaves))
            tensors = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
            grads = torch.autograd.grad(total, tensors, allow_unused=True)
            results.append([g if g is not None else torch.zeros_like(t) for g, t in zip(grads, tensors, strict=True)])
        assert_accurate(*results, f"gradient of {name} sample {i}")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name):
    samples = [with_grad(name, args) for args in arguments(name, "cpu", torch.float64)]
    small = [leaves for leaves in samples if 0 < sum(a.numel() for a in leaves if isinstance(a, Tensor)) <= 300]
    assert small
    for leaves in small:
        for function in (OPS[name], OPS[name].forward):
            outputs = function(*leaves)
            wanted = [i for i, o in enumerate(flat(outputs)) if o.requires_grad]
            assert torch.autograd.gradcheck(
                lambda *a, f=function, w=wanted: tuple(flat(f(*a))[i] for i in w), leaves, nondet_tol=0.0
            )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivative_is_refused_by_name(name):
    """Where nothing upstream needs a gradient, too, and to eager callers as to those of the operator."""
    args = next(a for a in arguments(name, "cpu", torch.float64) if a[0].numel() > 1)
    for function in (OPS[name], OPS[name].forward):
        leaves = with_grad(name, args)
        wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        outputs = [o for o in flat(function(*leaves)) if o.requires_grad]
        grads = torch.autograd.grad(sum(o.sum() for o in outputs), wanted, create_graph=True)
        assert all(g.requires_grad for g in grads)
        penalised = sum(o.sum() for o in flat(function(*leaves)) if o.requires_grad) + sum(
            g.square().sum() for g in grads
        )
        with pytest.raises(RuntimeError, match=f"{name}: has no second derivative"):
            penalised.backward()
        sum((x * g.detach()).sum() for x, g in zip(wanted, grads, strict=True)).backward()  # the gradient is of use


@pytest.mark.parametrize("name", MATRIX)
def test_opcheck(name, device):
    for args in filled(arguments(name, device, torch.float32)):
        torch.library.opcheck(OPS[name].forward, args)


@pytest.mark.parametrize("name", MATRIX)
def test_repeats_bit_for_bit(name, device):
    for args in filled(arguments(name, device, torch.float32)):
        for first, second in filled(zip(flat(OPS[name](*args)), flat(OPS[name](*args)), strict=True)):
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", MATRIX)
def test_non_contiguous_inputs_give_the_same(name, device):
    def strided(a):
        if not isinstance(a, Tensor) or a.ndim == 0:
            return a
        spread = torch.stack([a, a], -1).flatten(-2)  # every element twice along the last axis
        return spread[..., ::2]

    for args in filled(arguments(name, device, torch.float32)):
        for ours, theirs in filled(zip(flat(OPS[name](*map(strided, args))), flat(OPS[name](*args)), strict=True)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
