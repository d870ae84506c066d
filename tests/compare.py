"""Accuracy against float64, judged by plain torch's own error in the same dtype; and memory."""

import torch
from torch import Tensor
from torch.autograd.profiler import profile


def flat(outputs) -> list[Tensor]:
    """The outputs of an op as a list of tensors."""
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def filled(items):
    """The items, one by one; fails at their end if there was none, as a loop over them would have shown nothing."""
    number = 0
    for number, item in enumerate(items, 1):  # noqa: B007
        yield item
    assert number, "there is nothing to check"


def to_double(args) -> tuple:
    """The same arguments with every floating-point tensor in float64."""
    return tuple(a.detach().double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def assert_accurate(actual, exact, plain, what: str = "") -> None:
    """Fails unless |actual - exact| <= 2 max|plain - exact| + 8 eps scale for each output; 32 eps scale in float64,
    where the reference rounds as we do: sums of 10^4 terms, added in another order, are up to 20 eps apart.

    actual: what we computed; exact: the float64 reference; plain: the reference in the dtype of `actual`."""
    for i, (a, e, p) in enumerate(zip(flat(actual), flat(exact), flat(plain), strict=True)):
        assert a.shape == e.shape, f"{what} output {i}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        if not a.is_floating_point():
            assert torch.equal(a, p), f"{what} output {i} differs from the reference"
            continue
        same = (a.double() == e) | (a.isnan() & e.isnan())  # infinities and NaN must be the same
        finite = e.isfinite()
        assert bool((same | finite).all()), f"{what} output {i}: not finite where the reference is, or the reverse"
        if not bool(finite.any()):
            continue
        error = (a.double() - e)[finite].abs().max().item()
        allowed = 2 * (p.double() - e)[finite & p.isfinite()].abs().max().item()
        near = (32 if a.dtype == torch.float64 else 8) * torch.finfo(a.dtype).eps
        allowed += near * max(1.0, e[finite].abs().max().item())
        assert error <= allowed, f"{what} output {i}: error {error:.3g}, allowed {allowed:.3g}"


def peak_bytes(function):
    """The most memory that torch held at a time beyond what it held before."""
    with profile(profile_memory=True) as recorded:
        results = function()
    changes = [e.nbytes() for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    del results
    return peak
