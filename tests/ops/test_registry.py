"""An eager call of plain tensors goes past torch's dispatcher; whatever needs the dispatcher still gets it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastrlhf import approx_kl, value_loss

A, B = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.0])


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_a_mode_sees_the_operator(wants_gradient):
    with Seen() as seen:
        approx_kl(A.clone().requires_grad_(wants_gradient), B, estimator="k3")
    assert "fastrlhf.approx_kl.default" in seen.names


def test_a_profile_names_the_operator():
    with torch.autograd.profiler.profile() as profile:
        approx_kl(A, B, estimator="k3")
    assert "fastrlhf::approx_kl" in {event.name for event in profile.function_events}


def test_a_fake_tensor_gets_a_fake_result():
    mode = FakeTensorMode()
    assert isinstance(approx_kl(mode.from_tensor(A), mode.from_tensor(B), estimator="k2"), FakeTensor)


def test_a_negative_view_counts_as_what_it_shows():
    negative = torch.tensor([1.0 + 2.0j]).conj().imag
    assert negative.is_neg() and negative.item() == -2
    assert approx_kl(negative, torch.zeros(1), estimator="k1").item() == -2


def test_a_loss_without_a_gradient_of_its_own_gives_none():
    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    leaf = A.clone().requires_grad_()
    Undefined.apply(value_loss(leaf, B, A + 1)[0]).backward()
    assert leaf.grad is None


def test_a_second_derivative_is_refused():
    leaf = A.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value_loss(leaf, B, A + 1)[0] ** 2, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="value_loss: has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_a_meta_tensor_beside_a_real_one_is_refused(wants_gradient):
    with pytest.raises(ValueError, match="approx_kl: all tensors must be on one device"):
        approx_kl(A.to("meta").requires_grad_(wants_gradient), B)
    assert approx_kl(A.to("meta").requires_grad_(wants_gradient), B.to("meta")).shape == (3,)
